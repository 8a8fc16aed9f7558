"""Where requests go: an index of cached blocks, costs, policies. No socket, no task, no HTTP."""

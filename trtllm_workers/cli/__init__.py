"""The ``trtllm-launch`` command; heavy modules load only in the command that needs them."""

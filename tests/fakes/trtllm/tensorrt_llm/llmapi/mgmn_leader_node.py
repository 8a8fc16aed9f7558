"""``python -m tensorrt_llm.llmapi.mgmn_leader_node``: rank 0's stand-in in the MPI world."""

from .worlds import lead

if __name__ == "__main__":
    lead()

"""``python -m tensorrt_llm.llmapi.mgmn_worker_node``: the loop of a rank above 0."""

from .worlds import follow


def main() -> None:
    """Serve rank 0 until it is done."""
    follow()


if __name__ == "__main__":
    main()

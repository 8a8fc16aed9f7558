"""Where the engine configs that come with the project lie: in a checkout or an installed wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent


def shipped_engine_config(name: str) -> Path:
    """Return the path of ``engine_configs/<name>``. Raises FileNotFoundError when it is missing."""
    places = (_PACKAGE / "engine_configs" / name, _PACKAGE.parent / "engine_configs" / name)
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(f"engine_configs/{name} came neither at {places[0]} nor {places[1]}")


def shipped_engine_configs() -> list[Path]:
    """Return every engine config for TensorRT-LLM that comes with the project, sorted."""
    folder = shipped_engine_config("agg.yaml").parent
    others = ("sim", "eplb.yaml")  # costs of the simulator; a part that configs refer to
    return [
        path
        for path in sorted(folder.rglob("*.yaml"))
        if not any(part in others for part in path.relative_to(folder).parts)
    ]

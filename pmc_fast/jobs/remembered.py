"""What a run found with the untouched model and needs again where it is resumed: kept beside its checkpoints."""

import json
from pathlib import Path
from typing import Any

from ..config import UnlearnConfig
from ..utils.files import one_error, write_file


def directory_of(config: UnlearnConfig, checkpoints: Path) -> Path:
    """Return where an earlier start of the run kept what it found; `checkpoints` is this one's directory."""
    return checkpoints if config.resume in ("", "auto") else Path(config.resume).parent


def recall(path: Path, key: str) -> Any:
    """Return what a file holds; None if it is missing, damaged, or of another run than that of this hash."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content["found"] if content["of"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(path: Path, key: str, found: Any) -> None:
    """Write what was found, JSON-ready, for those alone who may read the checkpoints."""
    with one_error(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps({"of": key, "found": found}), private=True)

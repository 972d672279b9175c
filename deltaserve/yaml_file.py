"""Reading the YAML files that users write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deltaserve.errors import ConfigError


def read_yaml(file: Path) -> dict[Any, Any]:
    """The mapping that a file holds. Raises ConfigError: unreadable, malformed, a key twice."""
    import yaml  # only here: the engine runs where PyYAML is missing

    class Loader(yaml.SafeLoader):
        """Refuses a key that is given twice; YAML would silently keep the last."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            if twice := next((key for key in keys if keys.count(key) > 1), None):
                raise ConfigError(f"{file}: {twice!r} is given twice")
            return super().construct_mapping(node, deep)

    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: must hold a mapping of knobs to values")
    return content

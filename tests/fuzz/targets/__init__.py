"""What is tried. A target runs one numbered attempt, or a batch of them; the same number and seed try the same."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol


class Target(Protocol):
    """One kind of input."""

    def run(self, number: int, seed: str, note: Callable[[str], None], counts: dict) -> None:
        """Try. Raises an exception if the rule is broken.

        Args:
            note: takes what is about to be tried, each time.
            counts: where `right` answers and `refused` ones are counted.
        """


def make_targets(folder: Path, bundle: Path) -> Mapping[str, Target]:
    """All targets, by name; each is made when it is first used.

    Args:
        folder: to work in.
        bundle: of the golden checkpoint `linear_fp16_sharded`.
    """
    from fuzz.targets.chat import Chat, SavedConversations
    from fuzz.targets.files import BundleBytes, BundleJson, CheckpointBytes, CheckpointJson, Export
    from fuzz.targets.images import Images

    makers = {
        "checkpoint-bytes": lambda: CheckpointBytes(folder / "checkpoint-bytes"),
        "checkpoint-json": lambda: CheckpointJson(folder / "checkpoint-json"),
        "bundle-bytes": lambda: BundleBytes(folder / "bundle-bytes", bundle),
        "bundle-json": lambda: BundleJson(folder / "bundle-json", bundle),
        "export": lambda: Export(folder / "export", bundle),
        "images": lambda: Images(folder / "images"),
        "saved-conversations": lambda: SavedConversations(folder / "saved-conversations", bundle),
        "chat-openvino": lambda: Chat(folder / "chat-openvino", bundle, "openvino"),
        "chat-genai": lambda: Chat(folder / "chat-genai", bundle, "genai"),
    }
    return _Lazily(makers)


class _Lazily(dict):
    def __init__(self, makers: Mapping[str, Callable[[], Target]]):
        super().__init__()
        self._makers = makers

    def __missing__(self, name: str) -> Target:
        self[name] = self._makers[name]()
        return self[name]

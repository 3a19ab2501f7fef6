"""The tasks a recipe can name, one file each."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mvit.config import RunConfig
    from mvit.tasks.base import Task


def create_task(config: "RunConfig") -> "Task":
    """Return the task that `config.task` names."""
    if config.task == "detection":
        from mvit.tasks.detection import Detection

        return Detection(config)
    if config.task == "video_classification":
        from mvit.tasks.video_classification import VideoClassification

        return VideoClassification(config)
    from mvit.tasks.image_classification import ImageClassification

    return ImageClassification(config)

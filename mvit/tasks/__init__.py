"""The tasks a recipe can name, one file each."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mvit.config import RunConfig
    from mvit.tasks.base import Task


def create_task(config: "RunConfig") -> "Task":
    """Return the task that `config.task` names."""
    from mvit.tasks.image_classification import ImageClassification
    from mvit.tasks.video_classification import VideoClassification

    tasks = {"image_classification": ImageClassification, "video_classification": VideoClassification}
    return tasks[config.task](config)

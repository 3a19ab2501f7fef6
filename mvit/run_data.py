"""Opening the shards that a run trains and validates on."""

from data_pipeline.shards import ShardSet, open_shards
from mvit.config import ConfigError, RunConfig
from mvit.distributed import RankInfo, together
from mvit.evaluation import check_classes, open_validation


def open_data(config: RunConfig, ranks: RankInfo) -> tuple[ShardSet, ShardSet | None]:
    """Open and check all shards (collective); raises ConfigError or ShardError before any time is lost."""
    if config.data.train is None:
        raise ConfigError("data.train = None: training needs shards; set it to a packed folder or a pattern")
    opened: dict[str, ShardSet] = {}

    def open_all() -> None:
        assert config.data.train is not None
        spec, cache = config.data.train, config.data.cache_dir
        opened["train"] = open_shards(
            spec, cache_dir=cache, cache_gib=config.data.cache_gib, required=config.required_members
        )
        check_classes(config, opened["train"])
        if config.task == "detection":
            from data_pipeline.detection import training_samples

            opened["train"] = training_samples(opened["train"], config.detection)
        if config.data.validation is not None:
            opened["validation"] = open_validation(config)

    for first in (True, False):  # each node's first rank fetches and indexes, the others find it done
        together(open_all, "opening the shards", here=(ranks.local_rank == 0) == first)
    return opened["train"], opened.get("validation")

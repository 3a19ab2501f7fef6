"""Stands in for mvit.distributed: the stand-in's ranks form no group."""


def shutdown() -> None:
    """Do nothing."""

"""Stands in for mvit.distributed: the stand-in's ranks form no group."""


def start() -> None:
    """Do nothing."""


def shutdown() -> None:
    """Do nothing."""

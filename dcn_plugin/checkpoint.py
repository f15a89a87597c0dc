"""Checkpoint loading (being filled in)."""


def load_checkpoint(model, source, **options):
    raise NotImplementedError

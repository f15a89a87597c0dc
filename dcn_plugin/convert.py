"""Config-driven layer replacement (being filled in)."""


def convert(model, rules, input_size=None):
    raise NotImplementedError

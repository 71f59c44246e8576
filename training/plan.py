from recipe import Options


def print_plan(options: Options) -> None: ...

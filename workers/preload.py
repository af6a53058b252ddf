"""workers: loaded once by the server process that children are forked from, so that each child finds it all loaded."""

from importlib import import_module

from workers.registry import processors

for _processor in processors().values():
    for _module in _processor.preload:
        import_module(_module)

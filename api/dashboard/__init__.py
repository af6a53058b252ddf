"""api: the dashboard at /monitoring/events. Pages are made here and shown without a script; scripts keep them live.

It is a client of the interface in the same process: every page asks the routes that everybody asks, as whoever looks,
so it can show nothing that they may not see.
"""

"""The dashboard at /monitoring/events. Pages are rendered on the server and work without scripts; scripts update them.

Every page calls the public API routes in the same process, with the principal of its request. It can show nothing that
the principal may not see.
"""

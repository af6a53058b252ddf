"""Load the data that every session job needs, when this module is imported.

The fork server imports it once. Job processes share the memory.
"""

from jobledger.workers.processors.session.language import load_identifier

load_identifier()

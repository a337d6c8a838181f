"""What a process has loaded when it begins to serve is looked at by no later pass of the garbage collector."""

import gc
import weakref

from jaxserve.engine.lasting_heap import keep_what_is_loaded


class Node:
    def __init__(self):
        self.itself = self


def test_garbage_is_freed_and_the_rest_is_kept_from_later_passes():
    garbage, kept = weakref.ref(Node()), Node()
    try:
        keep_what_is_loaded()
        assert garbage() is None
        assert gc.get_freeze_count() > 0
        assert not any(found is kept for found in gc.get_objects())
        later = Node()
        assert any(found is later for found in gc.get_objects())
    finally:
        gc.unfreeze()

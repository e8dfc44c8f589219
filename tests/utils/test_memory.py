from tests.page_faults import glibc, memory_is_kept


@glibc
def test_memory_of_large_tensors_is_used_again_without_asking_the_system():
    assert memory_is_kept("from fourm.utils.memory import keep_freed_memory; keep_freed_memory()")

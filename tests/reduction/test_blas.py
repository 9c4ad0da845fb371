"""BLAS has one thread in each task, and as many as before after the last."""

from threadpoolctl import threadpool_info, threadpool_limits

from hydra_pipe.reduction.blas import single_threaded_blas


def blas_threads() -> set[int]:
    return {found["num_threads"] for found in threadpool_info() if found["user_api"] == "blas"}


def test_tasks_within_tasks_have_one_thread_and_the_last_gives_the_others_back() -> None:
    inner = single_threaded_blas(blas_threads)

    @single_threaded_blas
    def outer() -> list[set[int]]:
        return [blas_threads(), inner(), blas_threads()]

    with threadpool_limits(2, user_api="blas"):
        assert blas_threads() == {2}
        for _ in range(2):
            assert outer() == [{1}, {1}, {1}]
            assert blas_threads() == {2}

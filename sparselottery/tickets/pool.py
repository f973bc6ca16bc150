"""A few worker processes that run jobs and die with the process that started them."""

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import wait

import torch

GUARD = 'a script that starts its work under if __name__ == "__main__":'


def check_guarded() -> None:
    """Complain where a worker imports a script that would start the whole run again (and wait for itself for ever).

    Raises:
        RuntimeError: this is such a worker.
    """
    if getattr(
        multiprocessing.current_process(), "_inheriting", False
    ):  # set while a spawned process imports the script
        raise RuntimeError(f"workers: more than 1 needs {GUARD}")


def run_all(
    todo: Sequence[Hashable],
    needs: Callable[[Hashable], Hashable | None],
    done: set,
    function: Callable,
    shared: tuple,
    workers: int,
    threads: int | None = None,
) -> Iterator[Hashable]:
    """`function(*shared, item)` for every item of `todo`, each once the item that it `needs` is done; yields each when it is.

    Args:
        todo: in order of preference. done: items that were done before; those that are finished join them.
        workers: processes; 1 runs all in this one. threads: CPU threads of each; None is 1 with several workers, else torch's.
    """
    todo = list(todo)

    def ready() -> Hashable | None:
        for item in todo:
            if needs(item) is None or needs(item) in done:
                todo.remove(item)
                return item
        return None

    workers = min(workers, len(todo))
    if workers <= 1:
        with torch_threads(threads):
            while todo:
                item = ready()
                function(*shared, item)
                done.add(item)
                yield item
        return
    with Pool(workers, function, shared, threads or 1) as pool:
        while todo or pool.busy:
            while pool.idle and (item := ready()) is not None:
                pool.submit(item)
            for item in pool.finished():
                done.add(item)
                yield item


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Inside, torch uses so many CPU threads; None leaves it alone."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Pool:
    """`workers` processes, each running `function(*shared, item)` on one CPU thread (or `threads`), one item at a time.

    `shared` is sent once. The processes are spawned, so `function` and `shared` must pickle, and a script that uses a pool
    needs the usual `if __name__ == "__main__":`.
    """

    def __init__(self, workers: int, function: Callable, shared: tuple, threads: int = 1):
        try:
            work = pickle.dumps((function, shared))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise TypeError(
                f"workers: more than 1 needs a make_model and a fit that pickle, such as functions of a module ({error})"
            ) from None
        context = multiprocessing.get_context("spawn")
        self.idle, self.busy, self.processes = [], {}, []
        try:
            for _ in range(workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, threads), daemon=True)
                with _deaf_to_interrupts():
                    process.start()
                theirs.close()  # so that the worker's death shows as the end of the pipe
                self.processes.append(process)
                self.idle.append(ours)
            for connection in self.idle:  # once all are starting: it waits until the worker reads
                connection.send_bytes(work)
        except (BrokenPipeError, ConnectionResetError):
            self.close()
            raise RuntimeError(f"a worker process died at once: out of memory, killed, or not {GUARD}") from None
        except BaseException:
            self.close()
            raise

    def submit(self, item: Hashable) -> None:
        """Give `item` to an idle worker; there must be one."""
        connection = self.idle.pop()
        connection.send(item)
        self.busy[connection] = item

    def finished(self) -> list[Hashable]:
        """Wait until at least one item is done and return those.

        Raises:
            ValueError, TypeError, OSError: as its item raised it in a worker, whose traceback is told as the cause.
            RuntimeError: the item raised something else, or the worker died.
        """
        done = []
        for connection in wait(list(self.busy)):
            item = self.busy.pop(connection)
            try:
                failure = connection.recv()
            except (EOFError, ConnectionResetError):
                raise RuntimeError(
                    f"a worker process died at {item}: out of memory, killed, or (if at once) not {GUARD}"
                ) from None
            if failure is not None:
                error, text, told = failure
                cause = RuntimeError(f"in a worker process:\n{told}")
                raise (error or RuntimeError(f"{item} failed in a worker process: {text}")) from cause
            self.idle.append(connection)
            done.append(item)
        return done

    def close(self) -> None:
        """End the processes, in the middle of an item too."""
        for connection in [*self.idle, *self.busy]:
            connection.close()
        for process in self.processes:
            process.terminate()
            process.join()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _work(connection, threads) -> None:
    # A parent that is killed cannot end its workers: they watch it.
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(threads)
    function = None
    try:
        work = connection.recv_bytes()
        while True:
            item = connection.recv()
            try:
                if function is None:
                    function, shared = pickle.loads(work)
                function(*shared, item)
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
                connection.send((_mistake(error), text, traceback.format_exc()))
            else:
                connection.send(None)
    except (EOFError, BrokenPipeError):  # nobody is there any more
        return


def _mistake(error: Exception) -> Exception | None:
    """The error itself where it tells of a mistake and survives pickling, else None."""
    if not isinstance(error, ValueError | TypeError | OSError):
        return None
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an exception class of the user's may fail in any way
        return None
    return error


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes started inside never see Ctrl-C, which a terminal sends to all at once: who started them ends them."""
    resource_tracker.ensure_running()  # started later, it would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

"""Every operator multiplies as the matrix does, counts, and refuses what it cannot multiply."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ntkengine as ntk
from ntkengine import store
from ntkengine.errors import InputError, NotConverged
from ntkengine.gram.result import Gram
from ntkengine.spectrum import DeviceOperator, FactorOperator, ImplicitOperator, PanelOperator, ShardedOperator, eigsh
from tests.test_spectrum import with_spectrum

N = 600


@pytest.fixture(scope="module")
def matrix():
    return with_spectrum(np.r_[1e3, np.arange(1.0, N) ** -1.5])


def on_disk(path: Path, values: np.ndarray, noise: float = 1e-9) -> Gram:
    """Return the Gram as `open_gram` gives it: an HDF5 dataset in tiles."""
    store.write_gram(path, Gram(values, np.zeros((len(values), 1)), "trace", "sgd", noise), {}, {})
    return ntk.open_gram(path)


class Threads:
    """A communicator of threads: mpi4py's calls, as far as the operator makes them."""

    class Shared:
        def __init__(self, size):
            self.size, self.barrier, self.slots = size, threading.Barrier(size, timeout=60), [None] * size

    def __init__(self, shared, rank):
        self.shared, self.rank = shared, rank

    def Get_rank(self):  # noqa: N802
        return self.rank

    def allgather(self, item):
        self.shared.slots[self.rank] = item
        self.shared.barrier.wait()
        found = list(self.shared.slots)
        self.shared.barrier.wait()
        return found

    def bcast(self, item, root=0):
        return self.allgather(item)[root]

    def Bcast(self, buffer, root=0):  # noqa: N802
        buffer[...] = self.bcast(buffer.copy(), root)

    def Allgatherv(self, mine, receive):  # noqa: N802
        whole, counts = receive
        parts = self.allgather(mine.copy())
        assert [p.size for p in parts] == list(counts)
        whole[...] = np.concatenate(parts)


def on_ranks(size, work):
    """Return what `work(comm)` returns, or raises, on each rank."""
    shared, found = Threads.Shared(size), [None] * size

    def one(rank):
        try:
            found[rank] = work(Threads(shared, rank))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
    return found


def operators(tmp_path, matrix):
    values, vectors = np.linalg.eigh(matrix)
    features = vectors * np.sqrt(np.maximum(values, 0))
    np.save(tmp_path / "k.npy", matrix)
    return {
        "device": DeviceOperator(matrix),
        "panels of tiles": PanelOperator(on_disk(tmp_path / "k.h5", matrix), budget_mib=3),
        "panels of a memory map": PanelOperator(np.load(tmp_path / "k.npy", mmap_mode="r"), budget_mib=0.1),
        "factors": FactorOperator(features),
        "function": ImplicitOperator(lambda X: matrix @ X, N),
    }


def test_all_multiply_alike_and_count(tmp_path, matrix):
    X = np.random.default_rng(0).standard_normal((N, 5))
    for name, operator in operators(tmp_path, matrix).items():
        np.testing.assert_allclose(operator @ X, matrix @ X, atol=1e-10, err_msg=name)
        np.testing.assert_allclose(operator @ X[:, 0], matrix @ X[:, 0], atol=1e-10, err_msg=name)
        np.testing.assert_allclose(operator.T @ X[:, :1], matrix @ X[:, :1], atol=1e-10, err_msg=name)
        assert (operator.products, operator.passes) == (7, 3), name
        exact = np.linalg.eigvalsh(matrix)[-6:]
        ritz = eigsh(operator, 6)
        assert (np.abs(ritz.values - exact) <= ritz.bounds).all(), name
        assert ritz.method == "lanczos"


def test_panels_stay_in_their_budget_and_read_one_triangle(tmp_path, matrix):
    gram = on_disk(tmp_path / "k.h5", matrix)
    operator = PanelOperator(gram, budget_mib=2.5)
    assert operator.rows == 256
    assert operator.noise == gram.noise
    assert sum(b.nbytes for b in operator._buffers) <= 2.5 * 2**20
    assert operator.bytes_read == matrix.nbytes
    operator @ np.ones(N)
    assert operator.bytes_read - matrix.nbytes == 8 * (256 * 256 + 256 * 512 + 88 * 600)
    np.testing.assert_array_equal(operator.diagonal, matrix.diagonal())
    assert operator.norm == pytest.approx(np.linalg.norm(matrix))
    copied = np.concatenate([panel.copy() for _, _, panel in operator.panels()])
    np.testing.assert_array_equal(copied, matrix)
    with pytest.raises(InputError, match="budget_mib: expected at least 2 for 2 panels of 256 rows, got 1"):
        PanelOperator(gram, budget_mib=1)


def test_panels_multiply_stored_float32_in_float64(tmp_path, matrix):
    single = matrix.astype(np.float32)
    np.save(tmp_path / "k.npy", single)
    operator = PanelOperator(np.load(tmp_path / "k.npy", mmap_mode="r"))
    x = np.random.default_rng(1).standard_normal(N)
    np.testing.assert_allclose(operator @ x, single.astype(np.float64) @ x, atol=1e-11)
    assert operator.noise == pytest.approx(2.0**-24 * np.linalg.norm(single.astype(np.float64)), rel=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda K: K[:-1], r"square matrix \(N, N\), got shape \(599, 600\)"),
        (lambda K: K + np.triu(np.full_like(K, 1e-3), 1), "symmetric matrix, got triangles"),
        (lambda K: np.where(np.eye(N, k=-300) > 0, np.nan, K), "finite entries, row 300"),
        (lambda K: K.astype(int), "real numbers"),
    ],
)
def test_panels_refuse_bad_files(tmp_path, matrix, change, message):
    np.save(tmp_path / "k.npy", change(matrix))
    with pytest.raises(InputError, match=message):
        PanelOperator(np.load(tmp_path / "k.npy", mmap_mode="r"))


def test_a_large_gram_on_disk_is_streamed_by_eigsh(tmp_path, matrix, monkeypatch):
    monkeypatch.setattr("ntkengine.spectrum.lanczos._DENSE_ROWS", 500)
    ritz = eigsh(on_disk(tmp_path / "k.h5", matrix), 4)
    assert ritz.method == "lanczos"
    np.testing.assert_allclose(ritz.values, np.linalg.eigvalsh(matrix)[-4:], atol=1e-8)


def test_other_operators_refuse_what_they_cannot_multiply(matrix):
    with pytest.raises(InputError, match="finite entries, row 3"):
        FactorOperator(np.where(np.arange(8)[:, None] == 3, np.inf, np.ones((8, 2))))
    with pytest.raises(InputError, match=r"expected shape \(N, P\)"):
        FactorOperator(np.ones(4))
    with pytest.raises(InputError, match=r"product: expected shape \(600, 1\)"):
        ImplicitOperator(lambda X: X[:-1], N) @ np.ones(N)
    with pytest.raises(InputError, match="symmetric"):
        DeviceOperator(torch.triu(torch.ones(4, 4)))
    with pytest.raises(InputError, match="finite"):
        DeviceOperator(torch.full((4, 4), torch.nan))
    half = DeviceOperator(torch.eye(4, dtype=torch.float32) / 3)
    assert half.noise == pytest.approx(2.0**-24 * 2 / 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_matrix_on_the_gpu(matrix):
    operator = DeviceOperator(matrix, "cuda")
    np.testing.assert_allclose(eigsh(operator, 6).values, np.linalg.eigvalsh(matrix)[-6:], atol=1e-9)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_multiply_and_solve_as_one(matrix, size):
    cuts = np.linspace(0, N, size + 1).astype(int)
    X = np.random.default_rng(0).standard_normal((N, 3))

    def work(comm):
        panel = matrix[cuts[comm.Get_rank()] : cuts[comm.Get_rank() + 1]]
        operator = ShardedOperator(panel, comm, noise=1e-12 * comm.Get_rank())
        product = operator @ X
        return product, operator.start, operator.solve(lambda op: eigsh(op, 6)), operator.noise

    single = eigsh(ImplicitOperator(lambda X: matrix @ X, N, block=8), 6)
    for rank, (product, start, ritz, noise) in enumerate(on_ranks(size, work)):
        np.testing.assert_allclose(product, matrix @ X, atol=1e-11)
        assert start == cuts[rank]
        assert noise == 1e-12 * (size - 1)
        np.testing.assert_allclose(ritz.values, single.values, atol=1e-10)
        np.testing.assert_allclose(np.abs(np.sum(ritz.vectors * single.vectors, axis=0)), 1.0, atol=1e-9)


def test_what_rank_0_raises_is_raised_on_every_rank(matrix):
    def work(comm):
        operator = ShardedOperator(matrix[: N // 2] if comm.Get_rank() else matrix[N // 2 :], comm)
        return operator.solve(lambda op: eigsh(op, 6, max_products=8))

    # Rows in the wrong order make an operator that is not symmetric.
    assert all(isinstance(e, InputError) and "symmetric" in str(e) for e in on_ranks(2, work))

    def short(comm):
        operator = ShardedOperator(np.array_split(matrix, 2)[comm.Get_rank()], comm)
        return operator.solve(lambda op: eigsh(op, 6, max_products=8))

    for error in on_ranks(2, short):
        assert isinstance(error, NotConverged)
        assert error.partial.values.shape == (6,)
    bad = on_ranks(2, lambda comm: ShardedOperator(matrix[:10], comm))
    assert all(isinstance(e, InputError) and "rank 0 has shape" in str(e) for e in bad)


def test_gram_likes_keep_their_noise(tmp_path, matrix):
    assert DeviceOperator(SimpleNamespace(values=matrix, noise=0.25)).noise == 0.25


MPI = """
import sys
import numpy as np
from mpi4py import MPI
from ntkengine.ridge import conjugate_gradients
from ntkengine.spectrum import ShardedOperator, eigsh
comm, matrix = MPI.COMM_WORLD, np.load(sys.argv[1])
mine = np.array_split(np.arange(len(matrix)), comm.Get_size())[comm.Get_rank()]
operator = ShardedOperator(matrix[mine], comm)
ritz = operator.solve(lambda op: eigsh(op, 6))
right = np.cos(np.arange(len(matrix)))
found = operator.solve(lambda op: conjugate_gradients(op, right, 0.1, tol=1e-12))
np.savez(f"{sys.argv[2]}.{comm.Get_size()}.{comm.Get_rank()}.npz", values=ritz.values, solution=found.solution)
"""


def test_two_mpi_ranks_equal_one(tmp_path, matrix):
    pytest.importorskip("mpi4py")
    launcher = Path(sys.executable).parent / "mpiexec"
    if not launcher.exists():
        pytest.skip("no mpiexec beside the interpreter")
    root = Path(__file__).parent.parent
    np.save(tmp_path / "k.npy", matrix)
    for ranks in (1, 2):
        command = [launcher, "-n", ranks, sys.executable, "-c", MPI, tmp_path / "k.npy", tmp_path / "found"]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(root), str(root / "src")]),
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [str(c) for c in command], capture_output=True, text=True, check=False, timeout=600, env=environment
        )
        assert done.returncode == 0, done.stderr
    one, *two = (dict(np.load(tmp_path / f"found.{name}.npz")) for name in ("1.0", "2.0", "2.1"))
    for other in two:
        np.testing.assert_allclose(other["values"], one["values"], atol=1e-10)
        np.testing.assert_allclose(other["solution"], one["solution"], atol=1e-10)

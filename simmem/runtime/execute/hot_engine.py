"""One token after another on two units that share every layer: hot neurons and heads here, cold ones beside.

The thread that runs here launches on the unit with a memory of its own; the processor's part of each layer is computed
by a thread beside it (`simmem.runtime.execute.beside`), at the same time where launching is not computing (CUDA), and
the results are added up. Activations cross in fp32, and the numbers of the cold neurons with them, as in the schedule
(`simmem.policy.families._hot_cold_ops`). Which neurons a token uses comes from its trace: the predictor is multiplied,
its answer is not looked at. Active neurons are gathered, then multiplied: torch has no product over chosen rows.

Where keys and values lie in host memory, the hot heads' output projection runs where results are joined, and is timed
there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from simmem.runtime.cores import run_anywhere
from simmem.runtime.execute.beside import Beside, Lane
from simmem.runtime.execute.cache import padded
from simmem.runtime.execute.engine import Counted
from simmem.runtime.execute.heads import SomeHeads
from simmem.runtime.execute.hot_memory import HotMemory
from simmem.runtime.execute.kernels import NORM_EPSILON, Decoder, Rotary, vector_of
from simmem.runtime.execute.measured import Clock, Key, beside_name, nth_name
from simmem.runtime.execute.staging import buffer
from simmem.runtime.execute.task import HotTask

if TYPE_CHECKING:
    import torch

__all__ = ["HotEngine", "TwoDecoders"]

Ints = NDArray[np.int64]
_Arrived = Callable[[], None]
"""Returns once what was sent is there."""
_FFN_JOIN = nth_name("join", 1)
"""Behind attention's."""


class _Message:
    """Room for what crosses, in both memories: values in fp32, numbers of neurons (int32) behind them."""

    def __init__(self, length: int, device: torch.device) -> None:
        import torch

        self.near = torch.zeros(length, dtype=torch.float32, device=device)
        self.far = buffer(self.near.nbytes, device, apart=False).pinned.view(torch.float32)


class TwoDecoders:
    """The state of one sequence on both units; see `Decoder` for the parameters."""

    def __init__(self, task: HotTask, device: torch.device, context: int, *, rotary: Rotary | None = None,
                 epsilon: float = NORM_EPSILON, position_offset: int = 0) -> None:
        import torch

        a, cpu = task.layout.architecture, torch.device("cpu")
        self.near, self.far = (Decoder(a, task.layout.precision, where, 0, epsilon=epsilon) for where in (device, cpu))
        self.position_offset = position_offset
        here = task.heads.tolist()
        there = [a.n_kv_heads - n for n in here]
        self.near_heads = SomeHeads(a, self.near.dtype, device, counts=here, context=context, rotary=rotary,
                                    kept=[0] * len(here) if task.kv_on_host else here)
        self.far_heads = SomeHeads(a, self.far.dtype, cpu, counts=there, context=context, rotary=rotary,
                                   kept=[a.n_kv_heads] * len(here) if task.kv_on_host else there)

    @property
    def logits(self) -> torch.Tensor:
        return self.near.logits

    def fill_context(self) -> None:
        """See `Decoder.fill_context`."""
        self.near_heads.fill_context()
        self.far_heads.fill_context()


class HotEngine:
    """Runs the tokens of a task; a context manager that ends its thread.

    Parameters
    ----------
    memory : what is held, loaded.
    decoder : the state of the sequence.
    units : of each token and layer, the neurons that it uses, ascending.
    """

    def __init__(self, task: HotTask, memory: HotMemory, decoder: TwoDecoders, units: Sequence[Sequence[Ints]]) -> None:
        import torch

        a, n_tokens = task.layout.architecture, len(units)
        self.task, self.clock = task, Clock(memory.device)
        self._there = Clock(torch.device("cpu"), self.clock.times)
        self._memory, self._decoder, self._layers = memory, decoder, a.n_layers
        self._down_name, self._up_name = task.links
        self._down, self._up = (Lane(memory.device, self.clock, behind=behind) for behind in (True, False))
        shape = n_tokens, self._layers
        self._none = np.zeros(shape, np.int64)
        self._near_rows, self._far_rows = self._none.copy(), self._none.copy()
        self._sent_bytes, self._came_bytes = np.zeros(n_tokens, np.int64), np.zeros(n_tokens, np.int64)
        """Of each token, one counted by each thread. [B]"""
        # Which rows each token needs: known to the device before it runs, as if its predictor had said so.
        self._rows: list[list[torch.Tensor]] = []
        self._cold: list[list[torch.Tensor]] = []
        for number, layers in enumerate(units):
            split = [(side.place[active], active) for side, active in zip(memory.near, layers, strict=True)]
            self._rows.append([torch.from_numpy(place[place >= 0]).to(memory.device) for place, _ in split])
            self._cold.append([torch.from_numpy(active[place < 0].astype(np.int32)).to(memory.device)
                               for place, active in split])
            self._near_rows[number] = [len(rows) for rows in self._rows[-1]]
            self._far_rows[number] = [len(ids) for ids in self._cold[-1]]
        d = a.d_model
        self._messages = {name: _Message(length, memory.device) for name, length in (
            ("attention input", d), ("queries, keys, values", d + 2 * a.n_kv_heads * a.d_head),
            ("attention output", 2 * d), ("ffn input", d + a.d_ff), ("ffn output", d))}
        width = memory.near[0].rows.shape[1]
        most = self._near_rows.max(initial=0), self._far_rows.max(initial=0)
        self._near_room, self._far_room = (
            torch.zeros((padded(int(n)), width), dtype=decoder.near.dtype, device=where)
            for n, where in zip(most, (memory.device, torch.device("cpu")), strict=True))
        self._beside = Beside(torch.get_num_threads())

    def __enter__(self) -> Self:
        if self._memory.device.type == "cuda":
            run_anywhere()  # this thread only launches: the core it was bound to is needed by those that multiply
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._beside.__exit__(kind, error, trace)

    @property
    def counted(self) -> Counted:
        """What crossed and was multiplied so far; of layers that are not run yet, what will be."""
        return Counted(self._none, self._none, self._none, self._near_rows, self._sent_bytes + self._came_bytes,
                       self._far_rows)

    def token(self, number: int, token_id: int, position: int) -> torch.Tensor:
        """Run one token of the run; returns the id of the likeliest next one, on the device."""
        decoder, memory = self._decoder, self._memory
        memory.embed(token_id, position + decoder.position_offset, decoder.near.hidden)
        for layer in range(self._layers):
            self._attend(number, layer, position)
            self._feed(number, layer)
        with self.clock.op((number, "head", self._layers)):
            return decoder.near.finish(memory.head, memory.fixed)

    # --- attention --------------------------------------------------------------------------------

    def _attend(self, number: int, layer: int, position: int) -> None:
        near, heads, side = self._decoder.near, self._decoder.near_heads, self._memory.near[layer]
        here, there = heads.counts[layer], self._decoder.far_heads.counts[layer]
        handed: _Arrived | None = None
        job: Future[None] | None = None
        known: list[tuple[torch.Tensor, ...]] = []  # the cold heads' queries, keys, values

        def attend_beside() -> Future[None]:
            return self._beside.submit(lambda: self._attend_beside(number, layer, position, handed, known))

        if there:
            arrived = self._send(number, "attention input", layer, near.hidden)
            self._beside.submit(lambda: self._project_beside(number, layer, position, arrived, known))
            if not (here and self.task.kv_on_host):
                job = attend_beside()
        if here:
            with self.clock.op((number, "projections", layer)):
                q, k, v = heads.project(layer, near.attention_input(side.weights), side.weights, position)
            if self.task.kv_on_host:
                handed = self._send(number, "queries, keys, values", layer, q, k, v)
                job = attend_beside()
            else:
                with self.clock.op((number, "attention", layer)):
                    heads.keep(layer, 0, k, v, position)
                    near.hidden.add_(heads.out(heads.mix(layer, q, position), side.weights))
        if job is not None:
            self._arrive(job)
        with self.clock.op((number, "join", layer)) if job is not None else contextlib.nullcontext():
            came, seen = self._messages["attention output"].near, 0
            if handed is not None:
                seen = here * heads.group * self.task.layout.architecture.d_head
                near.hidden.add_(heads.out(came[None, :seen].to(near.dtype), side.weights))
            if there:
                near.hidden.add_(came[seen : seen + near.hidden.shape[1]])
            if "joined.bias" in side.weights:
                near.hidden.add_(vector_of(side.weights["joined.bias"]))

    def _project_beside(self, number: int, layer: int, position: int, arrived: _Arrived,
                        known: list[tuple[torch.Tensor, ...]]) -> None:
        """The cold heads' queries, keys and values, on the processor's thread."""
        arrived()
        far, side = self._decoder.far, self._memory.far[layer]
        with self._there.op(self._key(number, "projections", layer)):
            far.hidden[0].copy_(self._messages["attention input"].far)
            known.append(self._decoder.far_heads.project(layer, far.attention_input(side.weights), side.weights,
                                                         position))

    def _attend_beside(self, number: int, layer: int, position: int, handed: _Arrived | None,
                       known: list[tuple[torch.Tensor, ...]]) -> None:
        """Attention over the keys and values in host memory, and the cold heads' output, on the processor's thread."""
        import torch

        a, heads, side = self.task.layout.architecture, self._decoder.far_heads, self._memory.far[layer]
        here, out, used = self._decoder.near_heads.counts[layer], self._messages["attention output"], 0
        if handed is not None:
            handed()
        with self._there.op(self._key(number, "attention", layer)):
            queries = []
            if handed is not None:
                used, kept = here * heads.group * a.d_head, here * a.d_head
                came = self._messages["queries, keys, values"].far[: used + 2 * kept].split([used, kept, kept])
                q, k, v = (part.view(-1, a.d_head).to(self._decoder.far.dtype) for part in came)
                heads.keep(layer, 0, k, v, position)
                queries.append(q)
            if known:
                q, k, v = known[0]
                heads.keep(layer, here if self.task.kv_on_host else 0, k, v, position)
                queries.append(q)
            mixed = heads.mix(layer, torch.cat(queries) if len(queries) > 1 else queries[0], position)
            out.far[:used].copy_(mixed[0, :used])
            if known:
                out.far[used : used + a.d_model].copy_(heads.out(mixed[:, used:], side.weights)[0])
                used += a.d_model
        self._send_back(number, "attention output", layer, used)

    # --- FFN --------------------------------------------------------------------------------------

    def _feed(self, number: int, layer: int) -> None:
        near, memory = self._decoder.near, self._memory
        side, rows, cold = memory.near[layer], self._rows[number][layer], self._cold[number][layer]
        job: Future[None] | None = None

        def hand_over(x: torch.Tensor) -> Future[None] | None:
            if not len(cold):
                return None
            arrived = self._send(number, "ffn input", layer, x, ids=cold)
            return self._beside.submit(lambda: self._feed_beside(number, layer, len(cold), arrived))

        if self.task.predictor_params:
            with self.clock.op((number, "predictor", layer)):
                x = near.feed_input(side.weights)
                near.predict_low_rank(*memory.predictors[layer])
            job = hand_over(x)
        with self.clock.op((number, "ffn", layer)):
            if not self.task.predictor_params:
                x = near.feed_input(side.weights)
                job = hand_over(x)
            near.feed_rows(x, side.weights, [side.gathered(rows, self._near_room, self.task.layout.parts)])
        if job is not None:
            self._arrive(job)
            with self.clock.op((number, _FFN_JOIN, layer)):
                near.hidden.add_(self._messages["ffn output"].near)

    def _feed_beside(self, number: int, layer: int, n: int, arrived: _Arrived) -> None:
        """The cold neurons' part, on the processor's thread."""
        import torch

        arrived()
        far, side, sent = self._decoder.far, self._memory.far[layer], self._messages["ffn input"].far
        width = far.hidden.shape[1]
        with self._there.op(self._key(number, "ffn", layer)):
            index = torch.from_numpy(side.place[sent[width : width + n].view(torch.int32).numpy()])
            far.hidden.zero_()
            far.feed_rows(sent[None, :width].to(far.dtype), side.weights,
                          [side.gathered(index, self._far_room, self.task.layout.parts)])
            self._messages["ffn output"].far.copy_(far.hidden[0])
        self._send_back(number, "ffn output", layer, width)

    # --- between the two --------------------------------------------------------------------------

    def _key(self, number: int, name: str, layer: int) -> Key:
        return number, beside_name(name), layer

    def _send(self, number: int, name: str, layer: int, *values: torch.Tensor, ids: torch.Tensor | None = None
              ) -> _Arrived:
        """Hand vectors to the processor, as fp32, and numbers of neurons behind them."""
        message, used = self._messages[name], 0
        for some in values:
            message.near[used : used + some.numel()].copy_(some.reshape(-1))
            used += some.numel()
        if ids is not None:
            message.near[used : used + len(ids)].view(ids.dtype).copy_(ids)
            used += len(ids)
        self._sent_bytes[number] += message.near[:used].nbytes
        return self._down.copy((number, f"{name}.{self._down_name}", layer), message.near[:used], message.far[:used])

    def _send_back(self, number: int, name: str, layer: int, n: int) -> None:
        """Hand `n` values to the device, on the processor's thread."""
        message = self._messages[name]
        self._came_bytes[number] += message.far[:n].nbytes
        self._up.copy((number, f"{name}.{self._up_name}", layer), message.far[:n], message.near[:n])

    def _arrive(self, job: Future[None]) -> None:
        """Wait until the processor is done; what is launched next waits for its results."""
        job.result()
        self._up.join()

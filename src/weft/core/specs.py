"""The nouns of Weft as frozen records: plain data, hashable, JSON-able, with no file open inside.

What is long stays out of their reprs, which people read in notebooks and tracebacks.

A **checkpoint** maps tensor names to byte ranges; an **adapter** maps module paths to deltas. A
**plan** says for every output tensor what it is: an **expression** whose leaves are byte ranges.
An executor evaluates expressions and hands blocks to a sink; each finished tensor leaves a
**receipt**.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from weft.core.errors import Problem
    from weft.core.selection import Selection

Shape = tuple[int, ...]
Param = bool | int | float | str | tuple[int, ...] | tuple[float, ...]
Params = tuple[tuple[str, Param], ...]


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where the bytes of a tensor are: `start` to `stop` in `file`, contiguous, little-endian."""

    file: str
    name: str
    dtype: str
    shape: Shape
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


# ---------------------------------------------------------------------------------------- inputs


class Identity(NamedTuple):
    """What tells that a file has changed, or that another one has taken its name."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int


@dataclass(frozen=True, slots=True)
class Source:
    """A file that was read, as it was then.

    Attributes:
        path: Absolute.
        header: SHA-256 of the part that says where the tensors are (and of the whole of a config).
        identity: Of the open file that was read, not of what bears its name later.
    """

    path: str
    header: str
    identity: Identity


@dataclass(frozen=True, slots=True)
class Origin:
    """How weft made a checkpoint, as the manifest beside it says.

    Attributes:
        version: Of weft.
        created: When, in UTC; None in manifests that do not say it.
        base: The folder of the base.
        adapters: The folders of the adapters.
        survival: Of the whole update; None without one.
        command: As typed.
    """

    version: str
    created: str | None
    base: str
    adapters: tuple[str, ...]
    survival: float | None
    command: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A base model as it lies on disk.

    Attributes:
        given: What the user wrote: a path or `org/name@revision`.
        folder: The local folder that holds it.
        tensors: Every tensor, in the order of the shards and of the bytes within them.
        shards: File names in order.
        metadata: Of the first shard's header, strings only.
        config: The parsed `config.json`; empty if there is none.
        side_files: Relative paths of the files beside the weights that belong to the model.
        left_out: Relative paths of the files in the folder that do not.
        sources: The shards and the config, as they were read.
        origin: Where weft wrote it, from what; only `inspect` looks.
    """

    given: str
    folder: str
    tensors: dict[str, TensorRef] = field(repr=False)
    shards: tuple[str, ...] = field(repr=False)
    metadata: dict[str, str] = field(repr=False)
    config: dict[str, Any] = field(repr=False)
    side_files: tuple[str, ...] = field(repr=False)
    left_out: tuple[str, ...] = field(repr=False)
    sources: tuple[Source, ...] = field(repr=False)
    origin: Origin | None = None

    @property
    def nbytes(self) -> int:
        return sum(ref.nbytes for ref in self.tensors.values())


@dataclass(frozen=True, slots=True)
class AdapterEntry:
    """What an adapter does to one parameter of one module.

    Attributes:
        module: Dotted path of the module in the model that the adapter was trained on.
        parameter: `weight`, `bias` or whatever the module calls it.
        kind: File name in `weft.deltas`.
        tensors: Role (as the kind names it) and byte range.
        scaling: Factor of the low-rank product, alpha / r or alpha / √r.
        params: What else the kind needs.
        saved_as: The module of `modules_to_save` that it belongs to; one that the base does not
            have (a new task head) is added to it.
        alternatives: What else the same tensors could mean; the shapes in the base decide.
        optional: The base may lack the parameter (a bias that is only scaled) beside the module's
            weight: then there is nothing to change.
        reads: Another parameter of the module that the change depends on; the kind finds the
            base's tensor under its name.
    """

    module: str
    parameter: str
    kind: str
    tensors: tuple[tuple[str, TensorRef], ...]
    scaling: float = 1.0
    params: tuple[tuple[str, Param], ...] = ()
    saved_as: str | None = None
    alternatives: tuple[AdapterEntry, ...] = ()
    optional: bool = False
    reads: str | None = None

    @property
    def target(self) -> str:
        return f"{self.module}.{self.parameter}" if self.module else self.parameter


@dataclass(frozen=True, slots=True)
class Repair:
    """A defect of an adapter's keys that has one reading, and was read so.

    Attributes:
        what: The defect and what became of it.
        old, new: One of the keys, before and after.
        count: How many keys.
    """

    what: str
    old: str
    new: str
    count: int

    def __str__(self) -> str:
        more = f", and {self.count - 1} more" if self.count > 1 else ""
        return f"{self.what}: {self.old} -> {self.new}{more}"


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter as it lies on disk, whatever wrote it.

    Attributes:
        given: What the user wrote.
        folder: The local folder that holds it.
        sources: The weights and the config, as they were read.
        kind: The adapter method as its config spells it, such as `LORA`.
        entries: Every change, one per module parameter.
        tensors: Every tensor of the file: the ledger that the entries must use up.
        config: The parsed adapter config.
        base_model: What the config names as its base, and the revision of it.
        notes: What a reader of the file should know and no tensor shows.
        repairs: What was wrong with the keys and is put right in `entries`.
        keys: The key that PEFT would have written -> the one in the file.
        side_files: Relative paths of the files of a tokenizer or processor that it brings.
        left_out: Relative paths of what else lies there, leftovers of the training aside.
        selection: The modules that the config names, if it does.
        moved_base: The initialisation, by name, if it took its factors off the base.
        format: The tool whose layout the files have.
        flattened: Its modules' paths have underscores for dots.
        obstacles: Why it was not read to its end: it has no entries then, and is not merged.
    """

    given: str
    folder: str
    sources: tuple[Source, ...] = field(repr=False)
    kind: str
    entries: tuple[AdapterEntry, ...] = field(repr=False)
    tensors: dict[str, TensorRef] = field(repr=False)
    config: dict[str, Any] = field(repr=False)
    base_model: str | None
    revision: str | None
    notes: tuple[str, ...] = field(repr=False)
    side_files: tuple[str, ...] = field(repr=False)
    left_out: tuple[str, ...] = field(repr=False)
    selection: Selection | None = field(default=None, repr=False)
    repairs: tuple[Repair, ...] = field(default=(), repr=False)
    keys: dict[str, str] = field(default_factory=dict, repr=False)
    moved_base: str | None = None
    format: str = "PEFT"
    flattened: bool = False
    obstacles: tuple[Problem, ...] = field(default=(), repr=False)

    @property
    def files(self) -> tuple[str, ...]:
        """The weights and the config, by absolute path."""
        return tuple(source.path for source in self.sources)


# ------------------------------------------------------------------------------------ expressions


@dataclass(frozen=True, slots=True)
class Load:
    """A tensor as it is on disk."""

    ref: TensorRef


@dataclass(frozen=True, slots=True)
class Scaled:
    """A matrix of float8 numbers times their scales: W[i, j] = ref[i, j] · scale[i ÷ b₀, j ÷ b₁].

    Attributes:
        ref: The numbers (out, in).
        scale: One for each block, as a matrix (⌈out / b₀⌉, ⌈in / b₁⌉), whatever its shape on disk.
        block: (b₀, b₁): all of the matrix where it has one scale, (1, in) where each row has.
    """

    ref: TensorRef
    scale: TensorRef
    block: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Delta:
    """One adapter's change of one tensor; what the roles mean is said in `weft.deltas.<kind>`."""

    kind: str
    tensors: tuple[tuple[str, TensorRef], ...]
    scaling: float = 1.0
    weight: float = 1.0
    params: tuple[tuple[str, Param], ...] = ()

    def param(self, name: str, default: Param) -> Param:
        return dict(self.params).get(name, default)


@dataclass(frozen=True, slots=True)
class AddDeltas:
    """W + Σ weightᵢ · ΔWᵢ, every ΔWᵢ taken from the same W."""

    base: Expression
    deltas: tuple[Delta, ...]


@dataclass(frozen=True, slots=True)
class Merge:
    """What a merge method makes of several tensors of one shape.

    Attributes:
        method: File name in `weft.methods`.
        base: The tensor that the others are seen against; None where the method gives it no role.
        inputs: The others, in the order of the recipe.
        params: Shared by all inputs, after filters and gradients.
        each: Of each input.
        key: What random numbers are drawn by, beside the input's number and the element's.
    """

    method: str
    base: Expression | None
    inputs: tuple[Expression, ...]
    params: Params = ()
    each: tuple[Params, ...] = ()
    key: str = ""


@dataclass(frozen=True, slots=True)
class Run:
    """`count` rows that follow each other, each the mean of one row of every part.

    Attributes:
        count: How many.
        parts: (number of the source, its first row); none for rows of zeros.
    """

    count: int
    parts: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of other tensors in a new order, as a vocabulary is rearranged.

    Attributes:
        sources: Matrices of equally many columns.
        runs: The rows from the first on.
        padding: How many more rows follow that hold the mean of all of these.
    """

    sources: tuple[Expression, ...]
    runs: tuple[Run, ...]
    padding: int = 0


Expression = Load | Scaled | AddDeltas | Merge | Rows


def children(expression: Expression) -> tuple[Expression, ...]:
    """The expressions directly inside `expression`."""
    match expression:
        case Load() | Scaled():
            return ()
        case AddDeltas():
            return (expression.base,)
        case Merge():
            return (*((expression.base,) if expression.base else ()), *expression.inputs)
        case Rows():
            return expression.sources


def shape_of(expression: Expression) -> Shape:
    """Of the tensor that `expression` makes."""
    match expression:
        case Load() | Scaled():
            return expression.ref.shape
        case AddDeltas():
            return shape_of(expression.base)
        case Merge():
            return shape_of(expression.inputs[0] if expression.inputs else expression.base)  # type: ignore[arg-type]
        case Rows():
            rows = sum(run.count for run in expression.runs) + expression.padding
            return (rows, *shape_of(expression.sources[0])[1:])


def leaves(expression: Expression) -> list[TensorRef]:
    """Every byte range that `expression` reads."""
    if isinstance(expression, Load):
        return [expression.ref]
    if isinstance(expression, Scaled):
        return [expression.ref, expression.scale]
    refs = [ref for inner in children(expression) for ref in leaves(inner)]
    if isinstance(expression, AddDeltas):
        refs += [ref for delta in expression.deltas for _, ref in delta.tensors]
    return refs


def deltas_in(expression: Expression) -> list[Delta]:
    """Every delta that is added anywhere in `expression`."""
    found = [delta for inner in children(expression) for delta in deltas_in(inner)]
    return found + list(expression.deltas) if isinstance(expression, AddDeltas) else found


# ------------------------------------------------------------------------------------------ plans


@dataclass(frozen=True, slots=True)
class TensorJob:
    """One output tensor: its name, dtype and shape, the shard it goes to, and what it is."""

    name: str
    dtype: str
    shape: Shape
    shard: str
    expression: Expression

    @property
    def is_copy(self) -> bool:
        """The bytes are those of the input."""
        return isinstance(self.expression, Load) and self.expression.ref.dtype == self.dtype

    @property
    def operation(self) -> str:
        """`copy`, `cast`, `scaled`, a method, `rows`, or kinds of delta, as in `lora + lora`."""
        match self.expression:
            case Load():
                return "copy" if self.is_copy else "cast"
            case Scaled():
                return "scaled"
            case AddDeltas():
                return " + ".join(delta.kind for delta in self.expression.deltas)
            case Merge():
                return self.expression.method
            case Rows():
                return "rows"


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file beside the weights: copied from `source`, or written from `text`."""

    name: str
    source: str | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Input:
    """A file that is read: what the manifest says of it, and what tells that it has changed.

    Attributes:
        role: `base`, or `adapter 1` and so on.
        header: As in `Source`; None for a file that holds no tensors and is only copied.
        content: SHA-256 of the whole file; None for the base's weights, which are large.
        identity: Of the file whose header was read. It does not go into the plan's hash, which
            must be the same on another machine.
    """

    role: str
    path: str
    size: int
    header: str | None
    content: str | None
    identity: Identity = field(compare=False)


@dataclass(frozen=True)
class Plan:
    """Everything that a run will do; made from headers and configs alone.

    Attributes:
        jobs: One for each tensor of the output, in its order.
        metadata: Of every shard's header.
        side_files: Beside the shards.
        inputs: What is read.
        notes: How the inputs were brought together.
        warnings: What the user should know before using the output.
        repairs: Of adapters' keys.
        beside: Notes on where the side files come from.
    """

    jobs: tuple[TensorJob, ...] = field(repr=False)
    metadata: tuple[tuple[str, str], ...] = field(repr=False)
    side_files: tuple[SideFile, ...] = field(repr=False)
    inputs: tuple[Input, ...] = field(repr=False)
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    repairs: tuple[Repair, ...] = ()
    beside: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the output's tensors."""
        return sum(job_bytes(job) for job in self.jobs)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of what is computed from what, independent of where the files lie."""
        place = {
            entry.path: f"{entry.role}:{entry.path.rpartition('/')[2]}" for entry in self.inputs
        }

        def plain(value: Any) -> Any:
            if isinstance(value, TensorRef):
                file = place.get(value.file, value.file)
                return file, value.name, value.dtype, value.shape, value.start, value.stop
            if isinstance(value, AddDeltas):
                return plain(value.base), tuple(map(plain, value.deltas))
            if isinstance(value, Delta):
                refs = [(role, plain(ref)) for role, ref in value.tensors]
                return value.kind, refs, value.scaling, value.weight, value.params
            if isinstance(value, Merge):
                inner = plain(value.base) if value.base else None, *map(plain, value.inputs)
                return value.method, inner, value.params, value.each, value.key
            if isinstance(value, Rows):
                return tuple(map(plain, value.sources)), value.runs, value.padding
            if isinstance(value, Scaled):
                return plain(value.ref), plain(value.scale), value.block
            return plain(value.ref)

        digest = hashlib.sha256()
        for job in self.jobs:
            what = (job.name, job.dtype, job.shape, job.shard, plain(job.expression))
            digest.update(repr(what).encode())
        digest.update(repr(self.metadata).encode())
        digest.update(repr([(e.role, e.size, e.header, e.content) for e in self.inputs]).encode())
        return digest.hexdigest()


def job_bytes(job: TensorJob) -> int:
    """Size of the output tensor."""
    from weft.core.dtypes import itemsize

    return math.prod(job.shape) * itemsize(job.dtype)


# --------------------------------------------------------------------------------------- receipts


@dataclass(frozen=True, slots=True)
class Receipt:
    """What came of one job; sums of squares over all elements, in float64.

    Attributes:
        base: ‖W‖².
        delta: ‖ΔW‖².
        error: ‖(W′ − W) − ΔW‖², W′ being what was written.
        changed: Some element is not the base's.
        sound: No NaN or infinity was seen in it; what is only copied is not looked at.
    """

    name: str
    base: float | None = None
    delta: float | None = None
    error: float | None = None
    changed: bool = False
    sound: bool = True

    @property
    def relative(self) -> float | None:
        """‖ΔW‖ / ‖W‖, or None if W is zero or nothing was added."""
        if self.delta is None or not self.base:
            return None
        return math.sqrt(self.delta / self.base)

    @property
    def survival(self) -> float | None:
        """1 − ‖(W′ − W) − ΔW‖ / ‖ΔW‖, or None if there was no update."""
        if not self.delta or self.error is None:
            return None
        return 1 - math.sqrt(self.error / self.delta)

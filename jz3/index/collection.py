"""What index, query and explore read: texts with scores and features, whatever command made them."""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jz3.errors import Jz3Error
from jz3.index.docs import DocFile
from jz3.index.scores import Key, ScoreTable
from jz3.index.vectors import Member, Vectors
from jz3.models import load_tokenizer, resolve_model
from jz3.records import Doc, Query
from jz3.stage import StageContext
from jz3.store import Store, read_info

if TYPE_CHECKING:
    from jz3.features.extract import Projection


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """How texts and problems become gradients."""

    model: Path
    """Folder."""
    tokenizer: Path
    dtype: str
    products: str
    """See StoreInfo."""
    reduction: str
    query_tokens: int
    """Problems are cut at this length."""
    document_tokens: int
    """Texts are cut at this length, start tokens included."""


class Collection(abc.ABC):
    """Texts with scores and features; nothing large is loaded before it is asked for."""

    name: str
    models: tuple[str, ...]
    """Per checkpoint that is searched the name that it had when the run was made."""
    folder: Path
    """Of the run."""
    index: Path
    """Folder of the index, there or not."""
    probes: int | None = None
    """Cells visited per query by IVF indexes; None: as many as the index was built for."""
    prompt_field: str = ""
    """Field of a text's `meta` whose content is not scored, where the text begins with it."""
    weights: tuple[float, ...] = (1.0,)
    """Of the checkpoints whose features are searched together, see `Vectors`."""

    @property
    @abc.abstractmethod
    def missing_features(self) -> str:
        """Why no problem can be looked up, and the remedy; empty if there are features."""

    @property
    @abc.abstractmethod
    def seed(self) -> int:
        """Of the run."""

    @property
    @abc.abstractmethod
    def chosen(self) -> int:
        """How many texts the run chooses."""

    @property
    def is_indexed(self) -> bool:
        """Whether the index is built."""
        return (self.index / "index.json").is_file()

    @abc.abstractmethod
    def encoding(self, member: int = 0) -> Encoding:
        """Return how texts become gradients.

        Args:
            member: which of the checkpoints that are searched, counted from 0.

        Raises:
            Jz3Error: the model is missing or not the one of the run.
        """

    @abc.abstractmethod
    def projection(self, member: int = 0) -> "Projection":
        """Return what turns gradients into features."""

    @abc.abstractmethod
    def store(self, member: int = 0) -> Store:
        """Open the store.

        Raises:
            Jz3Error: there is none, or it is another run's; the message says what to do.
        """

    def vectors(self, projections: "Sequence[Projection] | None" = None) -> Vectors:
        """Open all stores that are searched.

        Args:
            projections: theirs, if they are loaded already.

        Raises:
            Jz3Error: see `store` and `projection`.
        """
        from jz3.features.extract import coding_of

        members = []
        for number, weight in enumerate(self.weights):
            store = self.store(number)
            projection = projections[number] if projections else self.projection(number)
            coding = coding_of(projection, store.info.bits)
            members.append(Member(store, coding, weight))
        return Vectors(members)

    @abc.abstractmethod
    def prepare_texts(self) -> None:
        """Make the table by which texts are found, unless it is there."""

    @abc.abstractmethod
    def texts(self, keys: Sequence[Key]) -> list[Doc]:
        """Return texts in the order of their keys.

        Raises:
            Jz3Error: one isn't in the corpus.
        """

    @abc.abstractmethod
    def queries(self) -> list[Query]:
        """Return the targets' queries; none if they aren't there any more."""

    @abc.abstractmethod
    def scores(self) -> ScoreTable | None:
        """Open the scores; None if there are none yet."""


class LoopCollection(Collection):
    """The texts of a run of the whole loop."""

    def __init__(self, ctx: StageContext) -> None:
        """Look at nothing yet.

        Args:
            ctx: of the run.
        """
        self._ctx = ctx
        self.folder, self.index = ctx.run_dir, ctx.run_dir / "index"
        self.name, self.models = ctx.recipe.name, (ctx.recipe.model.name,)
        self.probes, self.prompt_field = ctx.recipe.index.probes, ctx.recipe.features.prompt_field
        self._docs: DocFile | None = None

    @property
    def missing_features(self) -> str:
        """See Collection."""
        if (self.folder / "features" / "store" / "store.json").is_file():
            return ""
        return f"{self.folder} has no features yet; run `jz3 index {self.folder}`"

    @property
    def seed(self) -> int:
        """See Collection."""
        return self._ctx.seed

    @property
    def chosen(self) -> int:
        """See Collection."""
        return self._ctx.recipe.selection.k

    def encoding(self, member: int = 0) -> Encoding:
        """See Collection."""
        from jz3.gradients import start_tokens

        recipe = self._ctx.recipe
        model = resolve_model(recipe.model)
        starts = len(start_tokens(load_tokenizer(model)))
        return Encoding(
            model=model,
            tokenizer=model,
            dtype=recipe.model.dtype,
            products=read_info(self._ctx.path("features", "store")).products,
            reduction=recipe.features.reduction,
            query_tokens=recipe.features.query_tokens,
            document_tokens=recipe.corpus.max_tokens + starts,
        )

    def projection(self, member: int = 0) -> "Projection":
        """See Collection."""
        from jz3.features.extract import model_hash
        from jz3.features.stage import load_projection

        folder = self._ctx.path("features", "store").parent
        return load_projection(folder, model_hash(self.encoding().model))

    def store(self, member: int = 0) -> Store:
        """See Collection."""
        from jz3.features.stage import lost_documents

        folder = self._ctx.path("features", "store").parent
        lost = lost_documents(folder) if (folder / "manifest.json").is_file() else ""
        if lost:
            raise Jz3Error(f"{lost}; run `jz3 index {self.folder}` to write them again")
        return Store(folder / "store")

    def prepare_texts(self) -> None:
        """See Collection."""
        if self._docs is None:
            self._docs = DocFile(self._ctx.path("corpus", "docs.jsonl"), self.index)

    def texts(self, keys: Sequence[Key]) -> list[Doc]:
        """See Collection."""
        self.prepare_texts()
        assert self._docs is not None
        return [self._docs.get(key) for key in keys if not isinstance(key, tuple)]

    def queries(self) -> list[Query]:
        """See Collection."""
        if not (self.folder / "targets" / "queries.jsonl").is_file():
            return []
        return [Query.from_json(row) for row in self._ctx.rows("targets", "queries.jsonl")]

    def scores(self) -> ScoreTable | None:
        """See Collection."""
        path = self.folder / "influence" / "scores.parquet"
        return ScoreTable([path]) if path.is_file() else None

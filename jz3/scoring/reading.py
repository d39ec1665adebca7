"""Reading a planned corpus: shards in a row, single records, samples; no file is gone through twice in a row."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from jz3.corpus.parquet import ParquetReader
from jz3.corpus.readers import LineReader, SourceText
from jz3.records import Reject
from jz3.scoring.plan import Plan, Shard, split_place
from jz3.seeding import rng


class Reader:
    """Reads a plan's records and keeps the last file open where it stands.

    A compressed file, or a row group of Parquet, can only be read from its beginning: whoever takes
    its shards in order decompresses it once, and one who begins in the middle what lies before, once.
    """

    def __init__(self, plan: Plan) -> None:
        """Open nothing yet."""
        self.plan = plan
        self._file: LineReader | ParquetReader | None = None
        self._samples: dict[tuple[object, ...], list[SourceText]] = {}

    def close(self) -> None:
        """Close the file that is open."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def read(self, shard: Shard) -> Iterator[SourceText | Reject]:
        """Read a shard's records; what can't be used comes as a Reject."""
        file = self._open(shard)
        if isinstance(file, ParquetReader):
            yield from file.read(shard.skip, shard.rows)
        else:
            # The last shard reads on to the end, however that looks.
            yield from file.read(shard.skip, None if shard.last else shard.rows, (shard.skip, shard.offset))

    def read_places(self, places: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, SourceText]]:
        """Read single records in the corpus's order.

        Args:
            places: (shard, line or row in its file), in any order.

        Yields:
            (shard, line, text); a place that holds no usable text is left out.
        """
        for number, line in sorted(set(places)):
            shard = self.plan.shards[number]
            file = self._open(shard)
            if isinstance(file, ParquetReader):
                records = file.read(line - 1, 1)
            else:
                records = file.read(line - 1, 1, (shard.skip, shard.offset))
            for record in records:
                if isinstance(record, SourceText) and split_place(record.where)[1] == line:
                    yield number, line, record

    def refused(self, count: int = 100) -> list[Reject]:
        """Return what can't be used of the first `count` records."""
        records = (record for shard in self.plan.shards for record in self.read(shard))
        return [record for record in islice(records, count) if isinstance(record, Reject)]

    def sample(self, count: int, *purpose: str) -> list[SourceText]:
        """Draw texts by row number, the same for any number of workers.

        Args:
            count: how many; fewer if the corpus has not so many usable ones.
            purpose: what they are drawn for.
        """
        key = (count, *purpose)
        if key not in self._samples:
            self._samples[key] = self._draw(count, purpose)
        return self._samples[key]

    def _draw(self, count: int, purpose: tuple[str, ...]) -> list[SourceText]:
        plan = self.plan
        generator = rng(plan.settings.seed, "score", *purpose)
        # Some rows can't be used.
        asked = min(plan.rows, count * 2 + 32)
        drawn: dict[int, None] = {}
        while len(drawn) < asked:
            drawn.update(dict.fromkeys(generator.integers(0, plan.rows, asked).tolist()))
        order = list(drawn)[:asked]
        places = {}
        ranks = sorted(range(asked), key=lambda i: order[i])
        before = 0
        remaining = iter(ranks)
        rank = next(remaining, None)
        for shard in plan.shards:
            while rank is not None and order[rank] < before + shard.rows:
                places[shard.number, shard.skip + 1 + order[rank] - before] = rank
                rank = next(remaining, None)
            before += shard.rows
        found = {places[s, line]: text for s, line, text in self.read_places(list(places))}
        return [found[rank] for rank in sorted(found)][:count]

    def _open(self, shard: Shard) -> LineReader | ParquetReader:
        path = self.plan.check_file(shard.file)
        if self._file is None or self._file.path != path:
            self.close()
            kind = ParquetReader if path.suffix == ".parquet" else LineReader
            self._file = kind(Path(path), self.plan.source())
        return self._file

"""Parser of PTX text: modules, kernels, instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from .formats import TYPES, PtxError

# Type names, vector widths and state spaces are understood everywhere; these are understood per opcode.
# What is in neither list goes to `Module.ignored`.
HONOURED: dict[str, str] = {
    "add": "rn rz rm rp sat", "sub": "rn rz rm rp sat", "mul": "lo hi wide rn rz rm rp sat",
    "mad": "lo hi wide rn rz rm rp sat", "fma": "rn rz rm rp sat relu", "min": "NaN relu", "max": "NaN relu",
    "cvt": "rn rni rzi rmi rpi sat relu rz rm rp rna", "shf": "l r wrap clamp", "lop3": "or and pred",
    "setp": "eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu num nan and or xor",
    "shfl": "bfly up down idx", "vote": "ballot any all", "redux": "add min max and or xor",
    "atom": "add min max exch cas and or xor inc dec noftz", "red": "add min max and or xor inc dec noftz",
    "div": "rn", "rem": "", "sqrt": "rn", "rcp": "rn", "bfind": "shiftamt", "dp2a": "lo hi",
    "mma": "row col satfinite xor and popc", "ldmatrix": "trans m8n8", "stmatrix": "trans m8n8",
    "wgmma": "mma_async fence commit_group wait_group satfinite",
    "mbarrier": "init inval arrive expect_tx try_wait test_wait parity",
    "cp": "async commit_group wait_group wait_all bulk tensor 2d tile mbarrier bulk_group read",
    "bar": "warp cta red arrive", "barrier": "cta red arrive",
}  # fmt: skip
UNDERSTOOD = re.compile(
    r"v[24]|x[124]|m\d+n\d+(k\d+)?|[usb]\d+|b?f16(x2)?|tf32|f32|f64|pred|to|sync|aligned|uni"
    r"|global|shared(::cta)?|shared::cluster|local|param(::entry)?|const"
)
NUMERIC = frozenset("ftz approx full rz rm rp rna rs sat satfinite relu NaN xorsign abs cc".split())
NO_OPS = frozenset(
    "fence membar prefetch prefetchu griddepcontrol nanosleep setmaxnreg discard applypriority createpolicy".split()
)


def _ignored(op: str) -> set[str]:
    base, *mods = op.replace("mbarrier::complete_tx::bytes", "mbarrier").split(".")
    if base in NO_OPS:
        return {op}
    if op.startswith(("cp.async.bulk.commit_group", "cp.async.bulk.wait_group")):
        return {op}  # bulk stores take effect at issue
    known = HONOURED.get(base, "").split()
    return {f"{base}.{m}" for m in mods if m and m not in known and not UNDERSTOOD.fullmatch(m)}


@dataclass
class Instruction:
    """One instruction: `op` is its dotted name, `mods` the parts of it, `ty` the last that is a type."""

    op: str
    guard: tuple[str, bool] | None
    """Predicate register, and whether it is negated."""
    args: list[Any]
    scope: list[int]
    text: str
    target: int = -1
    """Of a branch: the index of an instruction."""

    def __post_init__(self) -> None:
        self.mods = self.op.split(".")
        self.base = self.mods[0]
        self.types = [m for m in self.mods if m in TYPES]
        self.ty = self.types[-1] if self.types else ""

    def error(self, why: str = "not covered") -> PtxError:
        """Return the error that names this instruction."""
        return PtxError(f"{why}: {self.text}")


class Module:
    """Parsed PTX text. `kernels[name]`; `ignored`: modifiers and instructions without effect here."""

    def __init__(self, text: str) -> None:
        text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
        text = re.sub(r"//[^\n]*", "", text)
        text = re.sub(r"(?m)^\s*\.(loc|file|pragma)\b[^\n]*", "", text)
        self.kernels: dict[str, Kernel] = {}
        self.shared: list[tuple[str, int, int]] = []
        self.ignored: set[str] = set()
        entries = list(re.finditer(r"\.(?:visible|weak)\s+\.entry\s+([\w$]+)\s*\(", text))
        if not entries:
            raise PtxError("no kernel (.visible .entry) in this PTX text")
        head = text[: entries[0].start()]
        for m in re.finditer(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]", head):
            self.shared.append((m[2], int(m[1]), int(m[3] or 0)))
        for m in entries:
            end = text.index(")", m.end()) if text[m.end() :].lstrip()[0] != ")" else m.end()
            start = text.index("{", end)
            stop = self._closing_brace(text, start)
            params = self._params(text[m.end() : end])
            self.kernels[m[1]] = Kernel(self, m[1], params, text[start + 1 : stop], text[end:start])

    @property
    def ignored_numeric(self) -> set[str]:
        """The ignored modifiers that can change a computed number on hardware."""
        return {x for x in self.ignored if x.split(".")[-1] in NUMERIC}

    @staticmethod
    def _closing_brace(text: str, start: int) -> int:
        depth = 0
        for m in re.compile(r"[{}]").finditer(text, start):
            depth += 1 if m[0] == "{" else -1
            if depth == 0:
                return m.start()
        raise PtxError("unbalanced braces")

    @staticmethod
    def _params(s: str) -> list[tuple[str, int, int]]:
        """Return (name, offset, size) of each parameter, laid out as in the parameter space."""
        out: list[tuple[str, int, int]] = []
        off = 0
        for p in filter(None, (x.strip() for x in s.split(","))):
            m = re.match(r"\.param\s+(.*?)([\w$]+)(?:\[(\d+)\])?$", p, re.S)
            bits = re.search(r"\.[bufs](\d+)", m[1]) if m else None
            if not m or not bits:
                raise PtxError(f"parameter not covered: {p}")
            align = re.search(r"^\.align\s+(\d+)", m[1].strip())
            width = int(bits[1]) // 8
            size = width * int(m[3] or 1)
            a = int(align[1]) if align else width
            off = (off + a - 1) // a * a
            out.append((m[2], off, size))
            off += size
        return out


class Kernel:
    """One .entry: `params`, `code` (list of Instruction), `regs`, `shared`, `local`, `ignored`."""

    def __init__(
        self, module: Module, name: str, params: list[tuple[str, int, int]], body: str, attributes: str
    ) -> None:
        self.name, self.params = name, params
        self.regs: dict[str, int] = {}
        self.shared, self.local = list(module.shared), []
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.ignored: set[str] = set()
        if re.search(r"\.reqnctapercluster|\.explicitcluster", attributes):
            self.ignored.add("directive .reqnctapercluster")
        self._parse(body)
        for ins in self.code:
            self.ignored |= _ignored(ins.op)
        module.ignored |= self.ignored

    def _parse(self, body: str) -> None:
        """Split into statements, telling {operand lists} from {scopes}; names in a scope become name@id."""
        cur, i, count = "", 0, 0
        self._scopes: list[dict[str, Any]] = [{}]
        while i < len(body):
            c = body[i]
            if c in "{}" and not cur.strip():
                if c == "{":
                    count += 1
                    self._scopes.append({"#": count})
                else:
                    self._scopes.pop()
            elif c == ";":
                self._statement(" ".join(cur.split()))
                cur = ""
            elif c == ":" and re.fullmatch(r"\s*[\w$]+", cur) and body[i + 1] != ":":
                self.labels[self._declare(cur.strip())] = len(self.code)
                cur = ""
            else:
                cur += c
            i += 1
        for ins in self.code:  # labels may be used before they are declared
            if ins.base == "bra":
                t = ins.args[0]
                t = next((f"{t}@{s}" for s in ins.scope if f"{t}@{s}" in self.labels), t)
                ins.target = self.labels[t]

    def _declare(self, name: str) -> str:
        scope = self._scopes[-1]
        scope[name] = f"{name}@{scope['#']}" if "#" in scope else name
        return scope[name]

    def _resolve(self, name: str) -> str:
        return next((s[name] for s in reversed(self._scopes) if name in s), name)

    def _statement(self, s: str) -> None:
        if not s or s.startswith((".pragma", ".loc", ".file")):
            return
        if s.startswith(".reg"):
            m = re.match(r"\.reg\s+\.(pred|[a-z]+(\d+))\s+(.*)", s)
            if not m:
                raise PtxError(f"register declaration not covered: {s[:80]}")
            w = int(m[2] or 1)
            for n in (x.strip() for x in m[3].split(",")):
                r = re.match(r"(.*)<(\d+)>", n)
                if r:
                    self.regs.update({f"{r[1]}{q}": w for q in range(int(r[2]))})
                else:
                    self.regs[self._declare(n)] = w
            return
        m = re.match(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.b(\d+)\s+([\w$]+)(?:\[(\d*)\])?", s)
        if m:
            width = int(m[2]) // 8
            self.shared.append((m[3], int(m[1] or width), width * int(m[4] or 1)))
            return
        m = re.match(r"\.local\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]", s)
        if m:
            self.local.append((m[2], int(m[1]), int(m[3])))
            return
        if s.startswith("."):
            raise PtxError(f"directive not covered: {s[:80]}")
        guard = None
        m = re.match(r"@(!?)([%\w$]+)\s+(.*)", s)
        if m:
            guard, s = (self._resolve(m[2]), bool(m[1])), m[3]
        m = re.match(r"([\w.:]+)\s*(.*)", s)
        if not m:
            raise PtxError(f"statement not covered: {s[:80]}")
        scope = [x["#"] for x in reversed(self._scopes) if "#" in x]
        self.code.append(Instruction(m[1], guard, self._split(m[2]), scope, s))

    def _split(self, s: str) -> list[Any]:
        out, depth, cur = [], 0, ""
        for c in s + ",":
            depth += (c in "{[") - (c in "}]")
            if c == "," and depth == 0:
                if cur.strip():
                    out.append(self._operand(cur.strip()))
                cur = ""
            else:
                cur += c
        return out

    def _operand(self, a: str) -> Any:
        """register/symbol -> str; number -> int or np.generic; {..} -> list; [..] -> ("M", base, offset) or
        ("T", tensor map, coordinates); d|p -> ("D", d, p)"""
        if a[0] == "{":
            return [self._operand(x.strip()) for x in a[1:-1].split(",")]
        if a[0] == "[":
            inner = a[1:-1].strip()
            if "{" in inner:
                tensor_map, coordinates = inner.split(",", 1)
                return ("T", self._operand(tensor_map.strip()), self._operand(coordinates.strip()))
            m = re.match(r"([%\w$]+)\s*(?:\+\s*(-?\w+))?$", inner)
            if not m:
                raise PtxError(f"address not covered: {a}")
            return ("M", self._resolve(m[1]), int(m[2] or "0", 0))
        if "|" in a:
            return ("D", *[self._resolve(x.strip()) for x in a.split("|")])
        if re.match(r"0[fF][0-9a-fA-F]{8}$", a):
            return np.uint32(int(a[2:], 16))
        if re.match(r"0[dD][0-9a-fA-F]{16}$", a):
            return np.uint64(int(a[2:], 16))
        if re.match(r"-?(0x[0-9a-fA-F]+|\d+)U?$", a):
            return int(a.rstrip("U"), 0)
        if a[0] == "!":
            return ("!", self._resolve(a[1:].strip()))
        return self._resolve(a)

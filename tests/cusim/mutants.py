"""The mutants of a CUDA source: small changes that its tests ought to notice.

The text is read token by token; what it takes for a binary operator has a space on either side, as clang-format writes it.
Most mutants are compiled together (:func:`instrument`): each place asks at run time whether it is the changed one. What the
compiler must know (constants of the file, sizes of shared arrays) is changed in the text, one at a time (:func:`changed_text`).
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

_NAMES = (
    "Plus - Minus + Times / Over * Rest / Left >> Right << And | Or & Xor & Less <= More >= AtMost < AtLeast > Same != Differs =="
)
OPERATORS = dict(
    zip(
        "+ - * / % << >> & | ^ < > <= >= == !=".split(),
        zip(_NAMES.split()[::2], _NAMES.split()[1::2], strict=True),
        strict=True,
    )
)
_COMPARISONS = {"<", ">", "<=", ">=", "==", "!="}
_BARRIERS = {"__syncthreads", "__syncwarp"}
_JUMPS = {"continue", "break"}
_TYPES = set(
    "float double int unsigned bool char short long void const constexpr static extern auto int64 typedef struct enum "
    "template using union class inline public private return goto case default __shared__ __device__ __global__ float2 float4 "
    "double2 int2 int4 uint2 uint4 asm else static_assert signed volatile do operator".split()
)
_TOKEN = re.compile(
    r"""(?P<comment>//[^\n]*|/\*.*?\*/)|(?P<string>"(?:[^"\\]|\\.)*")|(?P<space>(?:\s|\\\n)+)
    |(?P<number>0[xX][0-9a-fA-F]+[uUlL]*|(?:\d+\.\d*|\.\d+|\d+)(?:[eE][+-]?\d+)?[fFuUlL]*)|(?P<name>[A-Za-z_]\w*)
    |(?P<sign>\#\#|<<=|>>=|->|\+\+|--|&&|\|\||::|<<|>>|[-+*/%&|^<>=!]=|.)""",
    re.VERBOSE | re.DOTALL,
)


@dataclass(frozen=True)
class Mutant:
    """One change: of the text at ``begin``..``end`` to ``after``. ``edits`` make it one of many in a text."""

    file: str
    line: int
    text: str  # the whole line, without its indentation
    kind: str  # "operator", "comparison", "constant", "condition", "barrier", "statement", "index"
    before: str
    after: str
    nth: int  # among equal changes of equal lines in the file
    begin: int
    end: int
    edits: tuple[tuple[int, int, str], ...] = ()  # (place, rank there, what to insert, {} its number)

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """What names a mutant for as long as its line stays: file, line, change, which of several."""
        return self.file, self.text, self.before, self.after, self.nth


@dataclass
class _Token:
    kind: str
    text: str
    begin: int
    end: int


_OPEN, _CLOSE = {"(": ")", "[": "]", "{": "}"}, {")", "]", "}"}


class _Source:
    """A text as tokens, with brackets matched and every token's surroundings known."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[_Token] = []
        self.heads: set[int] = set()  # tokens of a directive's head
        self._read()
        self.pair: dict[int, int] = {}
        self.outer: list[int] = []  # the bracket that a token stands in, or -1
        stack: list[int] = []
        for i, t in enumerate(self.tokens):
            if t.text in _CLOSE and stack:
                self.pair[i] = stack[-1]
                self.pair[stack.pop()] = i
            self.outer.append(stack[-1] if stack else -1)
            if t.text in _OPEN:
                stack.append(i)
        self.inside = [self._in_body(i) for i in range(len(self.tokens))]

    def _read(self) -> None:
        directive = False
        head = 0
        for m in _TOKEN.finditer(self.text):
            kind, text = m.lastgroup or "", m[0]
            if kind == "space":
                if directive and re.search(r"(?<!\\)\n", text):
                    directive = False
                continue
            if kind == "comment":
                continue
            if text == "#" and not self.text[self.text.rfind("\n", 0, m.start()) + 1 : m.start()].strip():
                directive, head = True, len(self.tokens)
            self.tokens.append(_Token(kind, text, m.start(), m.end()))
            if directive:
                self._head(head)

    def _head(self, first: int) -> None:
        """Mark the part of a directive that is not code: all of it, or of a #define its name and parameters."""
        words = self.tokens[first:]
        if len(words) > 1 and words[1].text == "define":
            if len(words) <= 3:
                self.heads.add(len(self.tokens) - 1)
            elif words[3].text == "(" and words[3].begin == words[2].end:
                if not any(w.text == ")" for w in words[4:-1]):
                    self.heads.add(len(self.tokens) - 1)
        else:
            self.heads.add(len(self.tokens) - 1)

    def _in_body(self, i: int) -> bool:
        """Whether a token stands in the braces of a function, and not in an enum or struct of declarations only."""
        k = self.outer[i]
        while k >= 0:
            if self.tokens[k].text == "{" and self._opens_code(k):
                return True
            k = self.outer[k]
        return False

    def _opens_code(self, brace: int) -> bool:
        k = brace - 1
        while k >= 0 and self.tokens[k].text in ("const", "noexcept"):
            k -= 1
        if k >= 0 and self.tokens[k].text in ("}", ")"):  # the end of a parameter list, or of a constructor's initialisers
            return True
        return False

    def span(self, i: int, left: bool, stops: set[str]) -> tuple[int, int]:
        """(first, last) token of the operand on one side of token ``i``: up to its bracket or one of ``stops``."""
        step, k = (-1, i - 1) if left else (1, i + 1)
        last = k
        while 0 <= k < len(self.tokens) and self.outer[k] == self.outer[i] and self.tokens[k].text not in stops:
            if self.tokens[k].text in (_CLOSE if left else _OPEN):
                k = self.pair[k]
            elif self.tokens[k].text in (_OPEN if left else _CLOSE):
                break
            last = k
            k += step
        return (last, i - 1) if left else (i + 1, last)


def _other_number(text: str) -> str | None:
    if re.fullmatch(r"\d+[uUlL]*", text):
        digits = re.match(r"\d+", text)[0]  # type: ignore[index]
        return f"{int(digits) + 1}{text[len(digits) :]}"
    if text[:2] in ("0x", "0X"):
        return f"({text} + 1)"
    value = float(text.rstrip("fF"))
    return ("1.0" if value == 0 else f"(2 * {text})") + ("f" if value == 0 and text[-1] in "fF" else "")


class _Finder:
    def __init__(self, file: str, text: str) -> None:
        self.file, self.source = file, _Source(text)
        self.found: list[Mutant] = []
        self.lines = [0, *(m.end() for m in re.finditer("\n", text))]
        self.all_lines = text.split("\n")

    def add(self, kind: str, first: int, last: int, after: str, edits: Iterable[tuple[int, int, str]] = ()) -> None:
        tokens, text = self.source.tokens, self.source.text
        begin, end = tokens[first].begin, tokens[last].end
        number = text.count("\n", 0, begin) + 1
        before = " ".join(text[begin:end].replace("\\\n", " ").split())
        line = " ".join(self.all_lines[number - 1].rstrip("\\").split())
        if any(m.begin == begin and m.end == end and m.after == after for m in self.found):
            return
        self.found.append(Mutant(self.file, number, line, kind, before, after, 0, begin, end, tuple(edits)))

    # where an edit goes: closing brackets first, then the text of an operator, then opening ones; wider brackets outside
    def wrap(self, first: int, last: int, before: str, after: str) -> list[tuple[int, int, str]]:
        tokens = self.source.tokens
        begin, end = tokens[first].begin, tokens[last].end
        return [(begin, 2_000_000 - (end - begin), before), (end, end - begin, after)]

    def find(self) -> list[Mutant]:
        s = self.source
        for i, t in enumerate(s.tokens):
            if i in s.heads:
                continue
            if not s.inside[i]:
                self.file_scope(i)
            elif t.kind == "number":
                self.number(i)
            elif t.text in OPERATORS and self.spaced(i):
                self.operator(i)
            elif t.text in ("&&", "||"):
                self.logical(i)
            elif t.text == "?":
                self.choice(i)
            elif t.text == "if" and i + 1 < len(s.tokens) and s.tokens[i + 1].text == "(":
                self.condition(i + 2, s.pair[i + 1] - 1)
            elif t.text == "[":
                self.index(i)
            if s.inside[i] and self.begins_statement(i):
                self.statement(i)
        counts: Counter = Counter()
        numbered = []
        for m in sorted(self.found, key=lambda m: (m.begin, m.end, m.kind)):
            counts[m.key] += 1
            numbered.append(replace(m, nth=counts[m.key]))
        return numbered

    def spaced(self, i: int) -> bool:
        t, text = self.source.tokens[i], self.source.text
        return text[t.begin - 1].isspace() and text[t.end].isspace()

    def declared(self, i: int) -> bool:
        """Whether token ``i`` stands in the brackets of an array's declaration, or in a shared variable's."""
        s = self.source
        k = self.statement_start(i)
        return (
            s.tokens[k].text in _TYPES and s.tokens[k].text != "return" and s.outer[i] >= 0 and self.is_dimension(s.outer[i], k)
        )

    def is_dimension(self, bracket: int, start: int) -> bool:
        s = self.source
        if s.tokens[bracket].text != "[" or s.outer[bracket] != s.outer[start]:
            return False
        k = bracket - 1
        while k > start and s.tokens[k].text == "]":
            k = s.pair[k] - 1
        between = [t.text for j, t in enumerate(s.tokens[start:bracket], start) if s.outer[j] == s.outer[start]]
        tail = between[len(between) - between[::-1].index(",") :] if "," in between else between
        return "=" not in tail

    def statement_start(self, i: int) -> int:
        s = self.source
        k = i
        while k > 0:
            before = s.tokens[k - 1]
            if before.text == "}" and self.is_value(s.pair[k - 1]):
                k = s.pair[k - 1]
                continue
            if before.text in (";", "{", "}"):
                break
            k -= 1
        return k

    def is_value(self, brace: int) -> bool:
        """Whether a brace opens a value, `= {}` or `Draw{…}`, and not a block."""
        s = self.source
        before = s.tokens[brace - 1]
        return before.text in ("=", ",", "(", "return") or (before.kind == "name" and before.end == s.tokens[brace].begin)

    def file_scope(self, i: int) -> None:
        """Constants of the file: in the values of `const int X = …;` ."""
        s = self.source
        t = s.tokens[i]
        if t.kind != "number" or s.outer[i] >= 0:
            return
        k = self.statement_start(i)
        if s.tokens[k].text in ("const", "constexpr"):
            self.add("constant", i, i, _other_number(t.text) or "")

    def number(self, i: int) -> None:
        s = self.source
        t = s.tokens[i]
        if s.tokens[i - 1].text == "##" or (i + 1 < len(s.tokens) and s.tokens[i + 1].text == "##"):
            return
        if t.text[0] == "0" and s.tokens[i - 1].text == "<" and not self.spaced(i - 1):
            return
        bracket = s.outer[i]
        start = self.statement_start(i)
        if self.declared(i):
            words = {x.text for x in s.tokens[start:bracket]}
            if "__shared__" in words and t.kind == "number" and t.text.isdigit() and int(t.text) > 1:
                self.add("constant", i, i, str(int(t.text) - 1))
            return
        if (s.tokens[i - 1].text in ("<", ",") and not self.spaced_left(i - 1)) and self.in_template(i):
            return
        after = _other_number(t.text)
        if after:
            edits = self.wrap(i, i, "(cusim::changed({}) ? " + f"({after})" + " : ", ")")
            self.add("constant", i, i, after, () if self.is_constant(i) else edits)

    def spaced_left(self, i: int) -> bool:
        t, text = self.source.tokens[i], self.source.text
        return text[t.begin - 1].isspace()

    def in_template(self, i: int) -> bool:
        """Whether token ``i`` is an argument of a template: `name<4>(` ."""
        s = self.source
        k = i - 1
        while (k > 0 and s.tokens[k].text == ",") or s.tokens[k].kind in ("number", "name"):
            k -= 1
        return s.tokens[k].text == "<" and not self.spaced(k) and s.tokens[k - 1].kind == "name"

    def operator(self, i: int) -> None:
        if self.declared(i):
            return
        t = self.source.tokens[i]
        name, other = OPERATORS[t.text]
        kind = "comparison" if t.text in _COMPARISONS else "operator"
        edits = [(t.end, 1_000_000, f" cusim::{name}{{{{{{}}}}}} {t.text}")]
        self.add(kind, i, i, other, () if self.is_constant(i) else edits)

    def is_constant(self, i: int) -> bool:
        """Whether the compiler may have to know what token ``i`` is part of: a `const int X = …;`, a constexpr function."""
        s = self.source
        words = [t.text for t in s.tokens[self.statement_start(i) :][:2]]
        if words[0] in ("const", "constexpr") and words[1] in ("int", "unsigned", "bool", "int64"):
            return True
        body = i
        while s.outer[body] >= 0:
            body = s.outer[body]
        return any(t.text == "constexpr" for t in s.tokens[self.statement_start(body) : body])

    def logical(self, i: int) -> None:
        if self.is_constant(i):
            return
        t = self.source.tokens[i]
        stops = {",", ";", "?", ":", "=", "return", "&&", "||"} if t.text == "&&" else {",", ";", "?", ":", "=", "return", "||"}
        neutral, joined = ("true", "||") if t.text == "&&" else ("false", "&&")
        for left in (True, False):
            first, last = self.source.span(i, left, stops)
            test = "cusim::changed({})" if t.text == "&&" else "!cusim::changed({})"
            self.add("condition", first, last, neutral, self.wrap(first, last, f"({test} {joined} (", "))"))

    def choice(self, i: int) -> None:
        first, last = self.source.span(i, True, {",", ";", "?", ":", "=", "return", "+=", "-=", "*=", "/=", "&=", "|=", "^="})
        self.condition(first, last)

    def condition(self, first: int, last: int) -> None:
        """Turn a condition that has no comparison in it to its opposite, but for one that the compiler decides."""
        words = [t.text for t in self.source.tokens[first : last + 1]]
        if (
            first > last
            or any(w in _COMPARISONS or w in ("&&", "||") for w in words)
            or re.fullmatch(r"!?[A-Z_]+", "".join(words))
        ):
            return
        self.add("condition", first, last, "its opposite", self.wrap(first, last, "(cusim::changed({}) != (bool)(", "))"))

    def index(self, i: int) -> None:
        """Two indices of one array, swapped."""
        s = self.source
        end = s.pair[i]
        if end + 1 >= len(s.tokens) or s.tokens[end + 1].text != "[" or self.declared(i + 1):
            return
        first, second = (i + 1, end - 1), (end + 2, s.pair[end + 1] - 1)
        texts = [" ".join(s.text[s.tokens[a].begin : s.tokens[b].end].replace("\\\n", " ").split()) for a, b in (first, second)]
        if texts[0] == texts[1]:
            return
        edits = [
            *self.wrap(*first, f"(cusim::changed({{}}) ? ({texts[1]}) : (", "))"),
            *self.wrap(*second, f"(cusim::changed({{}}) ? ({texts[0]}) : (", "))"),
        ]
        self.add("index", i, s.pair[end + 1], f"[{texts[1]}][{texts[0]}]", edits)

    def begins_statement(self, i: int) -> bool:
        s = self.source
        t, before = s.tokens[i], s.tokens[i - 1]
        if t.kind != "name" and t.text not in ("*", "++", "--", "("):
            return False
        if s.outer[i] >= 0 and s.tokens[s.outer[i]].text != "{":
            return False
        if before.text == ")":
            opener = s.pair[i - 1]
            return s.tokens[opener - 1].text in ("if", "for", "while")
        if before.kind == "name" and before.text == "else":
            return t.text != "if"
        if before.kind == "number" or before.text == "unroll":  # after #pragma unroll
            return i - 1 in s.heads
        return before.text in (";", "{", "}")

    def after_template(self, i: int) -> _Token:
        """The token behind the template arguments that open at token ``i``: a name where a variable is declared."""
        tokens, depth = self.source.tokens, 0
        for t in tokens[i:]:
            if depth == 0 and t is not tokens[i]:
                return t
            depth += {"<": 1, ">": -1, ">>": -2}.get(t.text, 0)
        return tokens[-1]

    def statement(self, i: int) -> None:
        s = self.source
        t = s.tokens[i]
        end = i
        while end < len(s.tokens) and s.tokens[end].text != ";":
            if s.tokens[end].text in ("{", "}"):
                return
            end = s.pair[end] + 1 if s.tokens[end].text in ("(", "[") else end + 1
        if end >= len(s.tokens):
            return
        following = s.tokens[i + 1]
        declares = (
            t.text in _TYPES or (following.kind == "name" and t.text not in _JUMPS) or t.text in ("if", "for", "while", "switch")
        )
        if following.text in ("&", "*") and s.tokens[i + 2].kind == "name" and not self.spaced(i + 1):
            declares = True
        if following.text == "::" or (following.text == "<" and self.after_template(i + 1).kind == "name"):
            declares = True
        jump = t.text == "return" and following.text == ";"
        if declares and not jump:
            return
        kind = "barrier" if t.text in _BARRIERS else "statement"
        self.add(kind, i, end, "(nothing)", [(t.begin, 1_500_000, "if (cusim::changed({})) {{}} else ")])


def find(file: str, text: str) -> list[Mutant]:
    """Every mutant of a source text, in the order of the text."""
    return _Finder(file, text).find()


def instrument(text: str, numbered: Iterable[tuple[int, Mutant]]) -> str:
    """The text with all of these mutants in it, each behind its number."""
    edits = sorted(
        ((place, rank, k, what.format(number)) for number, m in numbered for k, (place, rank, what) in enumerate(m.edits)),
    )
    done, last = [], 0
    for place, _, _, what in edits:
        done += [text[last:place], what]
        last = place
    return "".join(done) + text[last:]


def changed_text(text: str, m: Mutant) -> str:
    """The text with one mutant in place."""
    return text[: m.begin] + m.after + text[m.end :]

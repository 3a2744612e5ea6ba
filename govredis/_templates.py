"""Key templates of decorators: "agent:{agent_id}" filled from the arguments of the decorated function.

Different arguments never give the same key. A template with one field, of a limit or a lock, has the text of its value
unchanged, as direct calls and the async service do. In any other template a value never contains the text that ends it:
a str is escaped like a URL's. A value of another type names its type ("int=1"), as 1 and "1" are different arguments.

In a template with one field a dict, a set, or a list that makes no id is a digest: "%sha256=" and the hash of the text
that it has in other templates. There it may hold only values whose text is the same in every process and every version
of Python. A list whose text makes an id keeps that text, as keys may not change from one version to the next.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import hashlib
import inspect
import re
import string
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from .errors import refuse
from .keys import ID_BYTES, Id, check_id, is_id

_formatter = string.Formatter()

#: The escaped characters: ASCII that is no part of a word, and characters that an id may not hold.
_RESERVED = r"[^A-Za-z0-9_.@+~\u00a0-\ud7ff\ue000-\U0010ffff-]"
_ESCAPED = re.compile(_RESERVED)
#: No escaped value contains these.
_END = re.compile(rf"(?![%=]){_RESERVED}")
#: The address in a default repr, which differs between objects; a text may contain such a repr too.
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")

#: The beginning of a digest; an escaped value has no % but before two hexadecimal digits.
_DIGEST = "%sha256="
_IS_DIGEST = re.compile(rf"{_DIGEST}[0-9a-f]{{64}}")
_CONTAINERS = (list, tuple, dict, set, frozenset)
#: The values that a digest may be made of, beside containers and members of enums, have these types and no others: the
#: text of any other type may change, as pathlib's did, or leave something out.
_STABLE = frozenset(
    (
        *(str, bytes, bool, int, float, type(None), decimal.Decimal, uuid.UUID),
        *(datetime.datetime, datetime.date, datetime.time, datetime.timedelta),
    )
)


class _Field(NamedTuple):
    """A field, and the text before it. The last field of a template may be text alone: `name` is None."""

    before: str
    name: str | None
    spec: str
    conversion: str | None


class KeyTemplate:
    """A template bound to a function's signature.

    A format spec or a conversion applies first: arguments that it makes equal give the same key.

    Args:
        template: text with the function's argument names in braces.
        function: the decorated function.
        shared: allow a template without arguments, with one key for all callers, as a lock may have.
        typed: values of different types are different, even in a template with one field; and None is a value.

    Attributes:
        plain: the key of a template without arguments.

    Raises ValueError at once for a name that is not an argument, and for a template that cannot be parsed. Raises it
    too for a template without arguments, unless `shared`: all callers would have one identity.
    """

    def __init__(
        self, template: str, function: Callable[..., Any], *, shared: bool = False, typed: bool = False
    ) -> None:
        self.template = template
        self._signature = inspect.signature(function)
        try:
            names = list(_names(template))
        except ValueError as error:
            raise ValueError(f"key {template!r}: {error}") from None
        known = [p.name for p in self._signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        where = f"key {template!r} of {getattr(function, '__qualname__', function)!s}"
        if not names and not shared:
            raise ValueError(f"{where} names no argument; it must name at least one of {', '.join(known) or '(none)'}")
        for name in names:
            if name.split(".")[0].split("[")[0] not in known:
                raise ValueError(f"{where} names {name!r}; the function's arguments are {', '.join(known) or '(none)'}")
        self.plain: str | None = None if names else template.format()
        self._typed = typed
        self._escapes = typed or len(names) > 1
        self._fields = [_Field(b, n, s or "", c) for b, n, s, c in _formatter.parse(template)]
        if self._escapes:
            self._fields = [f._replace(before=_apart(f, n)) for n, f in enumerate(self._fields)]
        #: All of the template but its values.
        self._words_alone = "".join([field.before for field in self._fields])

    def fill(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """The key for one call; a hash of it if the key would be too long for an id, and values are escaped.

        The order of a dict's items and of a set's makes no difference; whatever is nested in them counts by its type.

        Raises TypeError where the call does not fit the signature. Raises ValueError where a named argument is None,
        unless it is typed: all such calls would share one identity. Raises it too where an argument has no text of its
        own: its key would differ between processes, or be another object's later. So it does for a container that makes
        a digest, and holds a value that is none of _STABLE.
        """
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        try:
            key = "".join([field.before + self._text(field, bound.arguments) for field in self._fields])
        except RecursionError:
            raise ValueError(f"key {self.template!r}: an argument is nested too deep to be part of a key") from None
        if (
            self._escapes
            and len(key) * 4 > ID_BYTES
            and len(encoded := key.encode("utf-8", "surrogatepass")) > ID_BYTES
        ):
            return _digest(encoded)  # no other begins so: a % is escaped
        return key

    def may_meet(self, other: KeyTemplate) -> bool:
        """Could both templates give the same key? Both are typed; a word with a value in it may be any word."""
        (mine, my_ends), (others, other_ends) = self._words(), other._words()
        return my_ends == other_ends and all(a == b or None in (a, b) for a, b in zip(mine, others, strict=True))

    # -- inside --------------------------------------------------------------------------------------------------

    def _text(self, field: _Field, arguments: Mapping[str, Any]) -> str:
        name = field.name
        if name is None:
            return ""
        value, _ = _formatter.get_field(name, (), arguments)
        if value is None and not self._typed:
            raise ValueError(f"{name} is None, which identifies nobody")
        as_it_is = not field.spec and not field.conversion
        if as_it_is and self._escapes:
            return _typed(value, name)
        if as_it_is and isinstance(value, _CONTAINERS):
            return self._container(value, name)
        spec = _formatter.vformat(field.spec, (), arguments)
        converted = _formatter.convert_field(value, field.conversion)
        text: str = _formatter.format_field(converted, spec)
        if not isinstance(value, str):
            _refuse_unstable(value, text, name)
        if self._escapes:
            return _of_str(text)
        # Nobody can write the digest of another argument.
        return _digest_of(text, name) if _IS_DIGEST.fullmatch(text) else text

    def _container(self, value: Any, name: str) -> str:
        """The text of a container in a template with one field."""
        try:
            text: str = _formatter.format_field(value, "")
        except ValueError as error:  # of an int with thousands of digits
            raise ValueError(f"{name} has no text that could be part of a key: {error}") from None
        if is_id(self._words_alone + text) and not _ADDRESS.search(text):
            return text
        return _digest_of(value, name)

    def _words(self) -> tuple[list[str | None], list[str]]:
        """The text between the ends, None where it has a value in it; and the ends."""
        value = "\ue000"
        shape = "".join([field.before + ("" if field.name is None else value) for field in self._fields])
        return [None if value in word else word for word in _END.split(shape)], _END.findall(shape)


def check_key(key: Any, what: str, example: str) -> None:
    """Raise ValueError unless `key` is a str, or a callable whose call gives a key at once."""
    if not isinstance(key, str) and (not callable(key) or only_begins(key)):
        raise refuse(what, key, f'a template such as "{example}", a plain name, or a plain callable')


def name_of_calls(
    key: str | Callable[..., Id], function: Callable[..., Any]
) -> Callable[[tuple[Any, ...], Mapping[str, Any]], str]:
    """A function that returns the name of a call's lock from the call's arguments.

    Raises ValueError for a template that does not fit the function, and for a plain name that no lock can have. The
    function raises it where a callable gave no name.
    """
    if callable(key):
        what = f"the lock name that `key` gave for {getattr(function, '__qualname__', function)!s}"
        return lambda args, kwargs: check_id(key(*args, **kwargs), what)
    template = KeyTemplate(key, function, shared=True)
    if template.plain is not None:
        check_id(template.plain, "lock name")
    return template.fill


def only_begins(function: Any) -> bool:
    """Is it async, or a generator? Its call is over, and a decorator's work too, before its own work begins."""
    kinds = inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction
    return any(kind(function) for kind in kinds)


def refuse_unless_plain(function: Any, decorator: str) -> None:
    """Raise ValueError for a function that only begins when it is called."""
    inner = function.__func__ if isinstance(function, staticmethod) else function
    if only_begins(inner):
        name = getattr(inner, "__qualname__", inner)  # a partial has none
        raise ValueError(f"{name!s} only begins when it is called; @{decorator} is for plain functions")


def _names(template: str) -> Iterator[str]:
    for _, name, spec, _ in _formatter.parse(template):
        if name is not None:
            yield name
            yield from _names(spec or "")  # a format spec may name arguments too


def _apart(field: _Field, place: int) -> str:
    """The text before the field at that place, which ends the value before it."""
    text = field.before.replace("%", "%25")
    return text if place == 0 or field.name is None or _END.search(text) else f"{text}:"


def _digest(text: bytes) -> str:
    return _DIGEST + hashlib.sha256(text).hexdigest()


def _digest_of(value: Any, name: str) -> str:
    return _digest(_typed(value, name, _stable).encode("utf-8", "surrogatepass"))


def _stable(value: Any, name: str) -> str:
    """The text of a value within a digest: the same in every process and every version of Python."""
    if isinstance(value, enum.Enum):  # its str() and format() have changed between versions
        return str(value.value if isinstance(value, enum.Flag) else value.name)
    if type(value) not in _STABLE:
        _refuse_unstable(value, str(value), name)
        raise ValueError(
            f"{name} is, or holds, a {type(value).__qualname__}; a list or dict in a key may hold what JSON has, and"
            " bytes, Decimal, UUID, dates, times and Enums"
        )
    return str(value)


def _own(value: Any, name: str) -> str:
    """The text of a value that has one of its own, beside a type of its own."""
    text = str(value)
    _refuse_unstable(value, text, name)
    return text


def _typed(value: Any, name: str, text_of: Callable[[Any, str], str] = _own) -> str:
    """A text for a value that no value of another type has, and equal values of one type share."""
    kind = type(value)
    if kind is str:
        return _of_str(value)
    if kind is float:
        text = repr(value + 0.0)  # -0.0 is 0.0
    elif kind is bytes:
        text = value.decode("latin-1")
    elif kind in (list, tuple):
        text = "".join([f"{_typed(item, name, text_of)}," for item in value])
    elif kind in (set, frozenset):
        text = "".join(sorted([f"{_typed(item, name, text_of)}," for item in value]))
    elif kind is dict:
        pairs = [(_typed(key, name, text_of), _typed(item, name, text_of)) for key, item in value.items()]
        text = "".join(sorted([f"{key}:{item}," for key, item in pairs]))
    else:
        text = text_of(value, name)
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{_escape(module + kind.__qualname__)}={_escape(text)}"


def _of_str(text: str) -> str:
    return _escape(text) or "str="  # a key may not be empty


def _escape(text: str) -> str:
    return _ESCAPED.sub(lambda found: "".join(f"%{b:02X}" for b in found[0].encode("utf-8", "surrogatepass")), text)


def _refuse_unstable(value: Any, text: str, name: str) -> None:
    if hasattr(value, "__array__") and getattr(value, "shape", None):  # numpy's, pandas's; their scalars have no shape
        raise ValueError(
            f"{name} is of {type(value).__qualname__}, whose text leaves some of it out, so that others have the same;"
            " name an argument that identifies it, such as a hash"
        )
    if _ADDRESS.search(text):
        shown = text if len(text) <= 80 else f"{text[:77]}..."
        raise ValueError(
            f"{name} is {shown}, a text that differs for each object; name an attribute that identifies it, such as"
            f" {{{name}.id}}, or give it a __str__"
        )

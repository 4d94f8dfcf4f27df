"""From a function's signature to flags, help and errors.

A parameter whose type is a dataclass of settings stands for that dataclass's fields. Help comes from the
"Args:" of the docstrings; `flags.GROUPS` says under which heading a flag is listed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, get_args, get_origin, get_type_hints

from selfvae.cli.commands import GROUPS
from selfvae.cli.flags import GROUPS as HEADINGS
from selfvae.hints import unknown

__all__ = ["Flag", "flags_of", "overview", "parse"]

_EVERYWHERE = "Every command also takes --config FILE (YAML; flags on the command line override it) and \
--import MODULE (repeatable; imported first, for instance to register transforms of your own)."


@dataclass(frozen=True)
class Flag:
    """A flag, or a positional argument: `owner` is the parameter of settings that it is a field of."""

    name: str
    kind: object
    default: object
    help: str
    owner: str = ""

    @property
    def positional(self) -> bool:
        """Whether the argument is given without a flag."""
        return "Positional" in map(str, _marks(self.kind))

    @property
    def switch(self) -> bool:
        """Whether the flag takes no value: --name or --no-name."""
        return self.kind is bool

    @property
    def words(self) -> tuple[str, ...]:
        """How the flag is written."""
        word = _written(self.name)
        return (word, f"--no-{word[2:]}") if self.switch else (word,)


def _marks(kind: object) -> tuple[object, ...]:
    return get_args(kind)[1:] if get_origin(kind) is Annotated else ()


def _helps(doc: str) -> dict[str, str]:
    """The text of every entry in the "Args:" of a docstring."""
    section = re.search(r"^Arg(?:ument)?s:\n((?: +.*\n?|\n)*)", inspect.cleandoc(doc) + "\n", re.MULTILINE)
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section[1] if section else "", re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text).strip() for name, text in entries}


def _description(doc: str) -> str:
    return re.split(r"^Arg(?:ument)?s:$", inspect.cleandoc(doc), maxsplit=1, flags=re.MULTILINE)[0].strip()


def _as_flags(text: str, fields: Collection[str]) -> str:
    """Help that was written for Python: fields as flags, values without quotes."""
    text = re.sub(r"`?\b(\w+_\w+)\b`?", lambda m: _written(m[1]) if m[1] in fields else m[0], text)
    return text.replace('"', "").replace("`", "")


def _written(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def flags_of(function: Callable[..., object]) -> list[Flag]:
    """All flags of a command, those of its settings among them."""
    hints, helps = get_type_hints(function, include_extras=True), _helps(function.__doc__ or "")
    out = []
    for name, parameter in inspect.signature(function).parameters.items():
        kind, default = hints[name], parameter.default
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            out.append(Flag(name, kind, default, helps.get(name, "")))
            continue
        own, texts = get_type_hints(kind, include_extras=True), _helps(kind.__doc__ or "")
        for field in dataclasses.fields(kind):
            text = helps.get(field.name) or _as_flags(texts.get(field.name, ""), own)
            out.append(Flag(field.name, own[field.name], getattr(default, field.name), text, name))
    return out


def _annotated(flag: Flag) -> object:
    """The flag's type as tyro takes it: with the help, and the default in words that one can type."""
    from tyro.conf import arg

    hint: str | None = None
    if flag.default in (None, ()) or (flag.positional and flag.default is inspect.Parameter.empty):
        hint = ""  # the help says what comes of leaving it out
    elif flag.switch:
        hint = f"(default: {flag.words[0 if flag.default else 1]})"
    elif isinstance(flag.default, tuple):
        hint = f"(default: {' '.join(map(str, flag.default))})"
    return Annotated[flag.kind, arg(help=flag.help, help_behavior_hint=hint)]


def _form(flags: list[Flag]) -> tuple[type, dict[str, str]]:
    """A dataclass of dataclasses, one for each heading; and under which heading each flag is."""
    from tyro.conf import OmitArgPrefixes

    heading = {name: title for title, names in HEADINGS.items() for name in names}
    groups: dict[str, list[tuple[str, object, object]]] = {}
    for flag in flags:
        title = "" if flag.positional else heading.get(flag.name, "")
        required = flag.default is inspect.Parameter.empty
        field = dataclasses.field() if required else dataclasses.field(default=flag.default)
        groups.setdefault(title, []).append((flag.name, _annotated(flag), field))
    fields = groups.pop("", [])
    for title in [title for title in HEADINGS if title in groups]:
        part = dataclasses.make_dataclass(title, groups[title], kw_only=True)
        part.__doc__ = ""
        fields.append((title, Annotated[part, OmitArgPrefixes], dataclasses.field()))
    form = dataclasses.make_dataclass("Form", fields, kw_only=True)
    return form, {flag.name: "" if flag.positional else heading.get(flag.name, "") for flag in flags}


def check_flags(name: str, flags: list[Flag], words: list[str]) -> None:
    """Raise ValueError for the first flag that the command does not have."""
    known = [word for flag in flags if not flag.positional for word in flag.words] + ["--help"]
    for word in words:
        if word.startswith("--") and word.replace("_", "-") not in known:
            hint = f"selfvae {name} --help lists the flags"
            raise ValueError(unknown("flag", word, known, hint))


def parse(function: Callable[..., int | None], name: str, words: list[str]) -> Callable[[], int | None]:
    """The call of a command that the words of a command line stand for.

    Raises ValueError for an unknown flag, a missing one or a wrong value, SystemExit after --help.
    """
    flags = flags_of(function)
    check_flags(name, flags, words)
    import tyro

    form, titles = _form(flags)
    about = f"{_description(function.__doc__ or '')}\n\n{_EVERYWHERE}"
    options = (tyro.conf.DisallowNone,)
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            found: object = tyro.cli(
                form, args=words, prog=f"selfvae {name}", description=about, config=options
            )
    except SystemExit as end:
        if not end.code:  # --help
            raise
        raise ValueError(f"{_one_line(told.getvalue())} (selfvae {name} --help)") from None
    values = {
        f.name: getattr(getattr(found, titles[f.name]) if titles[f.name] else found, f.name) for f in flags
    }
    return partial(function, **_arguments(function, flags, values))


def _one_line(box: str) -> str:
    """What tyro says in a box, with or without vertical lines: title, message, rule, advice."""
    lines = [line.strip("│|").rstrip() for line in box.splitlines()]
    rules = [i for i, line in enumerate(lines) if re.search("[─-]{5}", line)]
    part = lines[rules[0] + 1 : rules[1]] if len(rules) > 1 else lines
    left = len(part[0]) - len(part[0].lstrip()) if part else 0
    if part and part[0].strip().startswith("Missing from"):
        # then the flags, and their help further to the right
        flags = [line.strip() for line in part[1:] if re.match(rf" {{{left + 4}}}\S", line)]
        return "missing " + ", ".join(flags)
    text = " ".join(" ".join(part).split())
    return text[:1].lower() + text[1:].rstrip(".")


def _arguments(
    function: Callable[..., object], flags: list[Flag], values: Mapping[str, object]
) -> dict[str, object]:
    """Values by parameter, those of settings put together again."""
    out: dict[str, object] = {flag.name: values[flag.name] for flag in flags if not flag.owner}
    hints = get_type_hints(function)
    for owner in dict.fromkeys(flag.owner for flag in flags if flag.owner):
        out[owner] = hints[owner](**{flag.name: values[flag.name] for flag in flags if flag.owner == owner})
    return out


def overview() -> str:
    """The help of `selfvae` itself."""
    width = len("--import MODULE") + 2
    lines = [
        "usage: selfvae [-h] [-v] COMMAND ...",
        "",
        "Self-supervised variational auto-encoders: density estimation, generation, enhancement and",
        "lossless compression of images.",
    ]
    for title, commands in GROUPS.items():
        lines += ["", f"{title}:"]
        lines += [f"  {name:<{width}}{command.help}" for name, command in commands.items()]
    lines += [
        "", "Options:",
        f"  {'-h, --help':<{width}}show this help, or after a command the command's",
        f"  {'-v, --version':<{width}}show the version",
        f"  {'--config FILE':<{width}}YAML file of flags; flags on the command line override it",
        f"  {'--import MODULE':<{width}}Python module to import first, for instance to register transforms",
        "",
        "selfvae COMMAND --help describes a command and its flags.",
    ]  # fmt: skip
    return "\n".join(lines)

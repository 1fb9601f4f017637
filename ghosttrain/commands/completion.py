"""Completion of verbs, options, groups, recipes and settings in bash and zsh.

`eval "$(ghosttrain -sc install=bash)"`, as Hydra documents it for its programs; the shell then asks
`ghosttrain -sc query=WORD` for each word that is begun.
"""

from __future__ import annotations

from collections.abc import Iterable

from ghosttrain.errors import UserError

SCRIPT = """\
_ghosttrain() {
  local line="${COMP_LINE:0:COMP_POINT}"
  local word="${line##* }"
  COMPREPLY=($(ghosttrain -sc query="$word" 2>/dev/null))
}
complete -o nospace -o default -F _ghosttrain ghosttrain
"""
ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def complete(request: str, options: Iterable[str]) -> int:
    """Print the script of a shell (`install=bash`), or what may stand for a word (`query=opt`).

    `options` are those of `train`.
    """
    kind, _, value = request.partition("=")
    if kind == "query":
        print("\n".join(candidates(value, options)))
    elif kind == "install" and value in ("bash", "zsh"):
        print((ZSH if value == "zsh" else "") + SCRIPT, end="")
    else:
        raise UserError(f"-sc {request}: type -sc install=bash or -sc install=zsh")
    return 0


def candidates(word: str, options: Iterable[str]) -> list[str]:
    """Return what may stand for a word that is begun. Of `model=gh` only what follows the `=`: both
    shells take that for a word of its own.
    """
    from ghosttrain.commands.help import VERB_NAMES
    from ghosttrain.config.identity import listed_values
    from ghosttrain.config.names import KEYS, Names

    names = Names(None)
    plus = "+" * (len(word) - len(word.lstrip("+")))
    key, equals, value = word.lstrip("+").partition("=")
    if word.startswith("-"):
        return [option for option in options if option.startswith(word)]
    if equals:
        *earlier, last = value.split(",")
        groups = (*names.groups, "recipe", "budget")
        choices = names.choices(key) if key in groups else listed_values(key)
        before = "".join(f"{choice}," for choice in earlier)
        return [f"{before}{choice}" for choice in choices if choice.startswith(last)]
    keys = [*names.groups, "recipe", "budget", *KEYS]
    verbs = [] if plus else [verb for verb in VERB_NAMES if verb.startswith(key)]
    return [*verbs, *(f"{plus}{name}=" for name in keys if name.startswith(key))]

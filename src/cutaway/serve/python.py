"""The clicks of the live page as a program that makes the same edits."""

from collections.abc import Callable

from cutaway.serve.wire import Change, Trial

Origins = Callable[[Change], tuple[list[int], list[int]]]


def program(model: str, trial: Trial, origins: Origins) -> str:
    """A Python program that asks the model the same under the same edits, and prints its first choices.

    Args:
        model: the name or path that the model is loaded by.
        trial: the texts and the edits.
        origins: positions of a patch, and where in the other text they come from.
    """
    sites = {
        kinds: sorted({change.site for change in trial.changes if change.kind in kinds})
        for kinds in (("mean", "cut"), ("patch",))
    }
    own, other = sites.values()
    lines = ["import cutaway", "", f"lm = cutaway.load({model!r})", f"text = {trial.text!r}"]
    lines += [f"own = lm.run(text, capture={own!r})"] if own else []
    lines += [f"other = lm.run({trial.other!r}, capture={other!r})"] if other else []
    made = []
    for number, change in enumerate(trial.changes):
        site, where = repr(change.site), _address(change)
        if change.kind == "zero":
            made.append(f"cutaway.zero({site}{where})")
        elif change.kind == "mean":
            head = "" if change.head is None else f"[[{change.head}]]"
            made.append(f"cutaway.mean({site}, own[{site}][0, 1:].mean(0){head}{where})")
        elif change.kind == "cut":
            lines.append(f"row_{number} = own[{site}][0, {change.head}, {change.position}].clone()")
            lines.append(f"row_{number}[{change.key}] = 0.0")
            made.append(f"cutaway.set({site}, row_{number}{where})")
        else:
            to, of = (places[0] if len(places) == 1 else places for places in origins(change))
            head = "" if change.head is None else f", heads={change.head}"
            made.append(f"cutaway.patch({site}, other, positions={to!r}, source_positions={of!r}{head})")
    lines += ["edits = [", *(f"    {edit}," for edit in made), "]"]
    lines.append('run = lm.run(text, edits=edits, logits="last")')
    lines.append("print(lm.token_strings(run.last_logits[0].topk(5).indices))")
    return "\n".join(lines) + "\n"


def _address(change: Change) -> str:
    words = [] if change.position is None else [f"positions={change.position}"]
    words += [] if change.head is None else [f"heads={change.head}"]
    return "".join(f", {word}" for word in words)

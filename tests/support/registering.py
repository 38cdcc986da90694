"""register() on a DeepSpeed that lacks one name, for each name that it needs: python -m support.registering prints JSON."""

import json

from largebatch.engine import patches, register
from largebatch.engine.internals import INTERNALS, MISSING, owner_of, value_at


def names_needed():
    """Every target of the table of patches, and every name that is read and has one place."""
    targets = [p.target for p in patches.FOR_THE_PROCESS if p.target not in patches.NEW_NAMES] + list(patches.LATER)
    targets += [i.places[0] for i in INTERNALS.values() if i.default is MISSING and len(i.places) == 1]
    return list(dict.fromkeys(targets))


def everything_changed():
    """What stands at every target, lists by their content."""
    values = [value_at(patch.target) for patch in patches.FOR_THE_PROCESS]
    return [list(value) if isinstance(value, list) else value for value in values]


def error_of_register():
    try:
        register.register()
    except RuntimeError as error:
        return str(error)
    return ""


def main():
    untouched, found = everything_changed(), {}
    apply_all = patches.apply_all
    for name in names_needed():
        owner, attribute = owner_of(name)
        kept = vars(owner)[attribute]
        delattr(owner, attribute)
        error = error_of_register()
        setattr(owner, attribute, kept)
        is_unchanged = everything_changed() == untouched
        undo = []
        patches.apply_all = lambda undo=undo: undo.append(apply_all())
        error_later = error_of_register()
        patches.apply_all = apply_all
        is_changed = all(a is not b and a != b for a, b in zip(everything_changed(), untouched, strict=True))
        for take_back in undo:
            take_back()
        register._is_registered = False
        found[name] = (error, is_unchanged, error_later, is_changed)
        assert everything_changed() == untouched, name
    print(json.dumps(found))


if __name__ == "__main__":
    main()

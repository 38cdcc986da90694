"""Writes every recipe of the tables and its row in the README: python -m largebatch.ds_configs.tables"""

from __future__ import annotations

import pathlib

import largebatch.ds_configs
from largebatch.ds_configs.tables.files import all_recipes, by_source, text_of
from largebatch.ds_configs.tables.readme import with_rows
from largebatch.ds_configs.tables.self_supervised import configs


def main() -> None:
    folder = pathlib.Path(largebatch.ds_configs.__file__).parent
    recipes = all_recipes()
    for name, config in recipes.items():
        (folder / f"{name}.json").write_text(text_of(config), encoding="utf-8")
    for name, config in configs():
        (folder / "self_supervised" / f"{name}.json").write_text(text_of(config), encoding="utf-8")
    readme = folder / "README.md"
    readme.write_text(with_rows(readme.read_text(encoding="utf-8"), by_source()), encoding="utf-8")
    print(f"wrote {len(recipes)} recipes and {readme.name} in {folder}")


if __name__ == "__main__":
    main()

"""Make `pytest --nbval` compare numbers within tolerances everywhere in this repository."""

pytest_plugins = ("pipeline.nbval_plugin",)

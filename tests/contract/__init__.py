"""The contract: what every optimizer of the library keeps, run over the one table in `table.py`."""

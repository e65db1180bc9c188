"""Inventory networks: stores with random demand, the warehouses and suppliers behind them."""

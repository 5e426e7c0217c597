"""What privacy costs, measured against everyone: same data, same model, same ε, same budget.

    python -m study [--quick] [--jobs 2]

A run is a `Cell` of the `grid`: one task, model, method, budget, ε and seed. Each is a process of its own and leaves
one JSON file; the report is made of those files alone.
"""

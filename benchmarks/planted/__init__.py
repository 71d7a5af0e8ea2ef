"""Planted ranks: a frozen network is fine-tuned towards a copy of itself that moved by updates of known ranks.

    python -m benchmarks.planted --case dense --seeds 0 1 2 --methods uniform learned oracle --json FILE
    python -m benchmarks.planted --case moe --methods uniform dynamic-paper dynamic-saliency learned oracle

A group is a layer (``dense``) or an expert (``moe``). ``uniform`` spreads a budget of rank components evenly,
``oracle`` gives each group the rank that was planted, ``learned`` and ``dynamic-*`` have to find out. In the cases
``*-powerlaw`` no rank is exact. The loss is the test error over the error without an adapter.

The budget is the sum of the planted ranks. ``oracle`` and ``learned`` spend exactly that, and so does ``uniform`` on
layers. DynamicRank's target is an integer per expert, so on experts ``dynamic-*`` and ``uniform`` both spend the mean
rounded to one: 154 components for 32 experts become 5 each, 160 in all. What each arm spent is the sum of its ranks.
"""

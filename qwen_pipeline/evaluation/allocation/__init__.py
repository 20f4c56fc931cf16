"""The choice of a precision for each module: measured divergence of parts, a knapsack over them, and its curve."""

"""The compiler: from a declared (f, P) and a loss to α, β and the drift; the flows and the optimizer as processes."""

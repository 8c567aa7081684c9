"""The compiler: derives α, β and the drift from a declared (f, P) and a loss, and builds the flows from them."""

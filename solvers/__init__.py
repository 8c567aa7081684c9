if __name__ != "dvi.solvers":  # a second copy under another name would load every class twice
    raise ImportError("import dvi.solvers, not solvers")

if __name__ != "dvi.methods":  # a second copy under another name would load every class twice
    raise ImportError("import dvi.methods, not methods")

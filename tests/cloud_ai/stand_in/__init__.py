"""A stand-in of the Cloud AI and QNN toolchains: checks everything they are given, compiles nothing.

It is written from the contract page alone and imports nothing of QEfficient, so that it can contradict it. What it
writes begins with ``QEFFICIENT-STAND-IN``, which no runtime takes for a program and which a manifest carries.
"""

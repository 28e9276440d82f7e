"""A stand-in of the Cloud AI and QNN toolchains and of the card's runtime: checks everything, compiles nothing.

It is written from the contract page alone and imports nothing of QEfficient, so that it can contradict it. What it
writes begins with ``QEFFICIENT-STAND-IN``, which no runtime takes for a program and which a manifest carries.
"""

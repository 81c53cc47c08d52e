"""Training many trials at once, as lanes of one batched model.

Tensor names end in the letters of their shape:

    K  lanes                        B  rows of a batch        C  classes
    P  parameters of one model      W  penalized ones (the first W of P)
    N  rows of a data set           S  steps of an epoch      D  dropout sites

A walk: ``engine`` (join, epoch, step, leave) → ``lanes`` (what a lane is) → ``model`` (the gradient
of all lanes) and ``recording`` (the same with less Python) → ``optimizers``, ``regularizers``,
``early_stopping`` and ``noise`` (what training is made of).
"""

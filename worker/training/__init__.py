"""Training many trials at once, as lanes of one batched model.

Tensor names end in the letters of their shape:

    K  lanes                        B  rows of a batch        C  classes
    P  parameters of one model      W  penalized ones (the first W of P)
    S  steps of an epoch            D  dropout sites          R  rows held out
    M  members of a trial           N  rows of a data set; noise keys of a step (D + 5)
    T  sums over rows from which loss and score are made

A walk: ``lanes`` (what a lane is: its trial, its tensors) → ``step`` (one optimizer step) →
``epoch`` (all steps, spread over the cores, and the validation) → ``engine`` (join, leave, train,
results, checkpoints). On the way: ``model`` (the gradient of all lanes), ``batches`` (who sees
which rows and noise), ``optimizers``, ``dropout``, ``regularizers``, ``objective``,
``early_stopping`` and ``noise`` (what training is made of), ``compiling``, ``repeating`` and
``capturing`` (the same, faster), ``capacity`` (how many). Around it: ``supply`` and ``residence``
(where rows are, and how they come), ``cores`` (how lanes are spread), ``layout`` and ``memory``
(how tensors lie, and what they take), ``checkpoint``, ``augmentation``, ``averaging`` (of weights),
``tracing`` and ``agreement`` (who may record a step, and whether two forms of it do the same).
"""

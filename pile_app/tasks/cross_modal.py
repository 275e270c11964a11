from lightning.pytorch import Callback
class EvaluateCrossModal(Callback):
    pass

"Bugs that distillation code has, each planted in a module of ours: (module, what is wrong, text in its source, what stands there instead)"

ENGINE_BUGS = [
    # the teacher
    ('teacher', 'teacher left trainable', 'model.requires_grad_(False).eval()', 'model.eval()'),
    ('teacher', 'teacher left in training mode', 'model.requires_grad_(False).eval()', 'model.requires_grad_(False)'),
    ('teacher', 'unfrozen with the student that holds it', 'if any(p.requires_grad for p in self.parameters): self.model.requires_grad_(False)', 'pass'),
    ('teacher', 'put into training mode with the student that holds it', 'if any(m.training for m in self.modules): self.model.eval()', 'pass'),
    ('teacher', 'teacher runs with gradients', 'with torch.no_grad():\n        if not self.taps', 'with torch.enable_grad():\n        if not self.taps'),
    ('teacher', 'one forward for each callback', 'if self._batch is None or self._batch[0] is not xb:', 'if True:'),
    ('teacher', 'answers of the batch before', 'if self._batch is None or self._batch[0] is not xb:', 'if self._batch is None:'),
    ('teacher', 'classes in the order of the teacher', 'return logits[:, [known.index(c) for c in wanted]]', 'return logits'),
    ('teacher', "images in the student's normalization", 'return prepare_images(x, stats, self.stats, self.channels.get(x.shape[1]) if first else None)', 'return x'),
    ('teacher', 'an ensemble with a member without logits', 'if len(logits)>1: self.check_outputs()', 'pass'),
    ('teacher', 'the loudest of several teachers', 'sum(w*z for w,z in zip(shares, logits))', 'sum(z for w,z in zip(shares, logits))'),
    ('teacher', 'average of weights never moves', 'def update(self:MeanTeacher, student):', 'def update_(self:MeanTeacher, student):'),
    # images in, logits out
    ('adapt', "predictions in the loader's normalization", 'return _Prepared(module, stats, own, size)', 'return module'),
    ('create', "a loaded model has the statistics of a Learner's loaders", 'return loaders if own is None or (loaders is not None and has_trained) else own', 'return loaders'),
    ('adapt', 'gray of normalized channels', 'pixels = x if stats is None else renormalize(x, stats, _PIXELS)', 'pixels = x'),
    ('adapt', 'probabilities softened as logits', "if self.kind!='probabilities': return z", 'return z'),
    ('adapt', 'logarithm of a sigmoid', 'return p.log() - torch.log1p(-p)', 'return p.log()'),
    ('adapt', 'a head of zeros is a false alarm', 'if high-low>1e-6 and _sum_to_one(z)', 'if _sum_to_one(z)'),
    ('adapt', 'the first of several tensors is taken for logits', 'if not flat or not all(p is first or torch.equal(p, first) for p in flat.values()): raise', 'if not flat: raise'),
    # the loop
    ('callbacks', 'KD counted in validation', 'needs_teacher = GradientAccumulation.order-1,False,', 'needs_teacher = GradientAccumulation.order-1,True,'),
    ('callbacks', 'weight of a term forgotten', 'self.total = self.total + weight*value', 'self.total = self.total + value'),
    ('callbacks', 'label loss counted once more for each callback', 'if self.peers[0] is self: self._start_terms(terms)\n    self.add_terms(terms)', "self._start_terms(terms) if self.peers[0] is self else terms.add('label_loss', self.label_loss(), 1.)\n    self.add_terms(terms)"),
    ('callbacks', 'label weight forgotten', "terms.add('label_loss', self.label_loss(), weight)", "terms.add('label_loss', self.label_loss(), 1.)"),
    ('callbacks', 'terms are not scaled by gradient accumulation', 'needs_teacher = GradientAccumulation.order-1', 'needs_teacher = GradientAccumulation.order+1'),
    ('callbacks', 'class weights on the label loss alone', 'weights,temperature = self.weights_of_classes(),', 'weights,temperature = None,'),
    ('callbacks', 'missing findings teach', 'return distillation_mask(y)', 'return None'),
    ('callbacks', 'softmax over findings', "return task!='multilabel' and self.columns>1", 'return True'),
    ('callbacks', 'MixUp: one of two targets', 'return [(mix.yb1[0], 1-lam), (self.learn.yb[0], lam)]', 'return [(self.learn.yb[0], None)]'),
    ('callbacks', 'rehearsal moves running means', 'with same_random_numbers(), evaluating(model), ExitStack() as watched:', 'with same_random_numbers(), ExitStack() as watched:'),
    ('callbacks', 'rehearsal draws random numbers', 'with same_random_numbers(), evaluating(model), ExitStack() as watched:', 'with evaluating(model), ExitStack() as watched:'),
    ('callbacks', 'both tokens answer in validation', 'finally: student.set_distilled_training(False)', 'finally: pass'),
    # features
    ('features', 'projector not trained', 'if self.projectors is not None: _lend_to_optimizer(self.learn, self.projectors.parameters())', 'pass'),
    ('features', 'projector not in checkpoints', 'own = {} if self.projectors is None else', 'own = {} if True else'),
    ('features', 'projector left in the optimizer', '    _take_from_optimizer(self.learn)\n    if self.finding_lr', '    if self.finding_lr'),
    ('features', 'projector of another student', 'if self.student is None or self.student() is not student:', 'if self.student is None:'),
    ('features', 'learning rate test ruins projectors', 'if self.finding_lr: self.projectors,self.finding_lr = self.kept,False', 'self.finding_lr = False'),
    ('features', 'mean over pairs forgotten', ' for ours,theirs in self.projected(self.maps())) / len(self.pairs)', ' for ours,theirs in self.projected(self.maps()))'),
    ('features', 'features overwritten in place', 'if self.capture.overwritten: self._watch(clone=self.capture.overwritten)', 'pass'),
    # exits
    ('multistage', 'shares do not sum to one', "'exit{k}': _scaled(self.exit_weight, share/sum(shares))", "'exit{k}': _scaled(self.exit_weight, share)"),
    ('multistage', 'exits answer in validation', 'finally: student.set_exit_training(False)', 'finally: pass'),
    # kept answers
    ('cache', 'answers of other weights', 'weights=_weights_digest(unwrap(v.model)), ', ''),
    ('cache', 'answers to other pixels', "pixels=self.dl.pixels_key(), ", ''),
    ('cache', 'a damaged answer is believed', 'self._check(', '(lambda *a: None)('),
]

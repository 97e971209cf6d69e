package hsm

type URI struct{ Token, Object string }

func (u URI) MatchesToken(label, _, _, _ string, _ uint) bool { return label == u.Token }
func (u URI) String() string                                  { return "pkcs11:token=" + u.Token }

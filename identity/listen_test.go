package identity_test

func helperListen() {}

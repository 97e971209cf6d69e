package main

import (
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func newCompletion(a *app) *cobra.Command {
	shells := map[string]func(*cobra.Command, io.Writer) error{
		"bash": func(root *cobra.Command, w io.Writer) error {
			if err := root.GenBashCompletionV2(w, true); err != nil {
				return err
			}
			_, err := io.WriteString(w, bashWithoutPackage)
			return err
		},
		"fish":       func(root *cobra.Command, w io.Writer) error { return root.GenFishCompletion(w, true) },
		"powershell": func(root *cobra.Command, w io.Writer) error { return root.GenPowerShellCompletionWithDesc(w) },
		"zsh":        func(root *cobra.Command, w io.Writer) error { return root.GenZshCompletion(w) },
	}
	names := slices.Sorted(maps.Keys(shells))
	return &cobra.Command{
		Use: "completion SHELL", Short: "Print what completes command lines in a shell",
		Long: `Prints a script that makes a shell complete the command lines of kms-agent. SHELL
is ` + strings.Join(names, ", ") + `. Read it at the start of the shell:

  bash  source <(kms-agent completion bash)
  zsh   source <(kms-agent completion zsh)    after autoload -Uz compinit; compinit
  fish  kms-agent completion fish | source`,
		Example:   "  kms-agent completion bash > /etc/bash_completion.d/kms-agent",
		Args:      exactly("SHELL"),
		ValidArgs: names,
		RunE: func(c *cobra.Command, args []string) error {
			write, ok := shells[args[0]]
			if !ok {
				return usagef("SHELL must be one of %s", strings.Join(names, ", "))
			}
			return write(c.Root(), a.out)
		},
	}
}

// bashWithoutPackage replaces the one function of cobra's script that cannot do
// without the bash-completion package. Bash splits words at = and : too; they
// are put together again.
const bashWithoutPackage = `
__kms-agent_init_completion()
{
    COMPREPLY=()
    if declare -F _get_comp_words_by_ref >/dev/null 2>&1; then
        _get_comp_words_by_ref "$@" cur prev words cword
        return
    fi
    local i
    words=("${COMP_WORDS[0]}")
    cword=0
    for ((i = 1; i <= COMP_CWORD; i++)); do
        if ((i > 1)) && [[ ${COMP_WORDS[i]} == [=:] || ${COMP_WORDS[i-1]} == [=:] ]]; then
            words[cword]+=${COMP_WORDS[i]}
        else
            words[++cword]=${COMP_WORDS[i]}
        fi
    done
    cur=${words[cword]}
    prev=${words[cword-1]}
}
`

// offerFilesWhereTheyFit keeps completion from offering files for what is none:
// arguments, unless they are called FILE or LOG, and times, pairs and names.
func offerFilesWhereTheyFit(c *cobra.Command) {
	if c.ValidArgs == nil && c.ValidArgsFunction == nil && !strings.Contains(c.Use, "FILE") && !strings.Contains(c.Use, "LOG") {
		c.ValidArgsFunction = cobra.NoFileCompletions
	}
	c.Flags().VisitAll(func(f *pflag.Flag) {
		noFile := f.Value.Type() == "duration" || f.Value.Type() == "stringArray" || slices.Contains([]string{"key", "to-key", "agent-id", "audience"}, f.Name)
		if _, known := c.GetFlagCompletionFunc(f.Name); noFile && !known {
			_ = c.RegisterFlagCompletionFunc(f.Name, cobra.NoFileCompletions) // fails for a second one only
		}
	})
	for _, child := range c.Commands() {
		offerFilesWhereTheyFit(child)
	}
}
